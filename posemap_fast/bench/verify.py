"""How far results are from the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["Tensors", "relative_error", "worst_error"]

Tensors = Sequence[torch.Tensor]


def relative_error(got: Tensors, want: Tensors) -> float:
    """Largest over the tensors of |got - want| / |want| in the 2-norm; NaN, and another shape, are infinitely wrong."""
    worst = 0.0
    for ours, theirs in zip(got, want, strict=True):
        if ours.shape != theirs.shape:
            return float("inf")
        difference = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-30)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def worst_error(sides: Sequence[Callable[[], Tensors]], reference: Callable[[], Tensors]) -> float:
    """The largest `relative_error` of several ways to the same tensors."""
    want = reference()
    return max(relative_error(side(), want) for side in sides)
