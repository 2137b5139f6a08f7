"""Triplet loss between features of rendered and real images (DFNet, arXiv:2204.00559, section 3.3; L_image of PoseMap).

It closes the gap between the two domains: features of one view should agree whether it is photographed or rendered,
and differ from those of another view.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from posemap_fast.errors import ConfigError, ShapeError

__all__ = ["hardest_pairing", "triplet_loss"]

_AXES = {"channels": 2, "width": 4}


def triplet_loss(
    rendered: torch.Tensor,
    real: torch.Tensor,
    margin: float = 1.0,
    distance: Literal["channels", "width"] = "channels",
) -> torch.Tensor:
    """Triplet margin loss whose negatives are the other views of the batch, with the hardest of four pairings.

        mean max(0, |a - p + 1e-6|_2 - |a - n + 1e-6|_2 + margin)

    The norm runs over one axis, the mean over all others. 'channels' compares descriptors per cell. 'width' is the
    literal form of DFNet's code: a 5-D input to a loss that reduces the innermost axis, so an image row per channel.

    Args:
        rendered, real: (levels, B, C, h, w), row b of both showing the same view; B >= 2. Half precision is compared
            in float32: the 1e-6 and the differences of near features would be lost in its mantissa.
    Raises:
        ShapeError: B = 1 (the negative would be the positive), or shapes differ.
    """
    _check(rendered, real)
    if distance not in _AXES:
        raise ConfigError(f"triplet distance must be one of {', '.join(_AXES)}; got '{distance}'")
    rendered, real = _precise(rendered), _precise(real)
    anchor, positive, negative = _pairings(rendered, real)[hardest_pairing(rendered, real)]
    axis = _AXES[distance]
    return functional.triplet_margin_loss(
        anchor.movedim(axis, -1), positive.movedim(axis, -1), negative.movedim(axis, -1), margin=margin
    )


@torch.no_grad()
def hardest_pairing(rendered: torch.Tensor, real: torch.Tensor) -> int:
    """Index of the pairing whose anchor and negative are nearest by mean squared difference; no gradient.

    0: rendered with the next real view; 1: real with the next rendered view; 2: rendered with the next rendered
    view; 3: real with the next real view.
    """
    _check(rendered, real)
    pairings = _pairings(_precise(rendered), _precise(real))
    scores = [functional.mse_loss(anchor, negative) for anchor, _, negative in pairings]
    return int(torch.stack(scores).argmin())


def _precise(features: torch.Tensor) -> torch.Tensor:
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def _pairings(rendered: torch.Tensor, real: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(anchor, positive, negative) of the four cases; the negatives are the neighbours in the batch."""
    next_rendered, next_real = rendered.roll(1, dims=1), real.roll(1, dims=1)
    return [
        (rendered, real, next_real),
        (real, rendered, next_rendered),
        (rendered, real, next_rendered),
        (real, rendered, next_real),
    ]


def _check(rendered: torch.Tensor, real: torch.Tensor) -> None:
    if rendered.dim() != 5 or rendered.shape != real.shape:
        raise ShapeError(
            "triplet_loss: rendered and real must both have shape (levels, B, C, h, w); got "
            f"{tuple(rendered.shape)} and {tuple(real.shape)}"
        )
    if rendered.shape[1] < 2:
        raise ShapeError(
            "triplet_loss: needs two views or more, for the negative is another view of the batch; got B = "
            f"{rendered.shape[1]}; raise the batch size or add cached views"
        )
