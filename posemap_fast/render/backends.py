"""The functions that march and composite rays, by name; all have the contract of `posemap_fast.ops`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast import ops
from posemap_fast.ops import CompositeOutput
from posemap_fast.ops.reference.composite import composite
from posemap_fast.registry import Registry

__all__ = ["RENDER_BACKENDS", "MarchingBackend"]


@dataclass(frozen=True)
class MarchingBackend:
    """Sampling and compositing of rays."""

    march: Callable[..., Any]
    compact: Callable[..., Any]
    composite: Callable[..., Any]


RENDER_BACKENDS: Registry[MarchingBackend] = Registry("render backend")
RENDER_BACKENDS.register("native")(MarchingBackend(ops.march, ops.compact, ops.composite))


def _on_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """A non-differentiable op, run on its reference."""

    def run(*arguments: Any) -> Any:
        with ops.use_backend("reference"):
            return function(*arguments)

    return run


def _composite_reference(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    ray_offsets: torch.Tensor,
    features: torch.Tensor | None,
    early_stop_eps: float,
) -> CompositeOutput:
    """The oracle with ordinary autograd, also of higher order."""
    features = sigmas.new_zeros(len(sigmas), 0) if features is None else features
    return CompositeOutput(*composite(sigmas, t_starts, t_ends, rgbs, features, ray_offsets, early_stop_eps))


RENDER_BACKENDS.register("reference")(
    MarchingBackend(_on_reference(ops.march), _on_reference(ops.compact), _composite_reference)
)
