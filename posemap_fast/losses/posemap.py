"""Losses between PoseMaps (B, C, h, w): cosine for L_posemap, L2 for L_rvs (PoseMap, arXiv:2403.12800, section 3.3)."""

from __future__ import annotations

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ShapeError

__all__ = ["posemap_cosine", "posemap_l2"]


def posemap_cosine(
    predicted: torch.Tensor,
    target: torch.Tensor,
    cell_weights: torch.Tensor | None = None,
    epsilon: float = 1e-2,
) -> torch.Tensor:
    """Mean over cells of 1 - cosine similarity of the channel vectors.

    Each vector is extended by the constant coordinate `epsilon`, so the loss is smooth everywhere:

        1 - (a.b + e^2) / (sqrt(|a|^2 + e^2) sqrt(|b|^2 + e^2))

    computed as half the squared distance of the two unit vectors, which does not cancel near equality.
    A cell that both maps leave empty (opacity 0, hence a zero vector) costs 0 instead of 0 / 0, and the gradient
    stays below 1 / epsilon per cell. Where |a|, |b| >> epsilon it is the plain cosine.

    Args:
        predicted, target: (B, C, h, w), same shape, not empty.
        cell_weights: (B, h, w) >= 0 such as the opacity of the target, or None for equal weights;
            all zero gives a loss of 0.
    Returns:
        Scalar in [0, 2]; value and gradient are 0 at equality.
    """
    _check("posemap_cosine", predicted, target)
    inverse = (predicted.square().sum(1, keepdim=True) + epsilon**2).rsqrt()
    inverse_target = (target.square().sum(1, keepdim=True) + epsilon**2).rsqrt()
    channels = (predicted * inverse - target * inverse_target).square().sum(1)
    constant = (epsilon * (inverse - inverse_target)).square().squeeze(1)
    return _weighted_mean("posemap_cosine", (channels + constant) / 2, cell_weights)


def posemap_l2(
    predicted: torch.Tensor,
    target: torch.Tensor,
    cell_weights: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Mean over cells of |F_hat - F|_2 / scale; arguments as `posemap_cosine`.

    Args:
        scale: a constant of the map, such as the mean norm of its cells; 1 is the paper's form.
    Returns:
        Scalar >= 0; value and gradient are 0 at equality.
    """
    _check("posemap_l2", predicted, target)
    if not scale > 0:
        raise ShapeError(f"posemap_l2: scale must be > 0; got {scale}")
    distance = torch.linalg.vector_norm(predicted - target, dim=1) / scale
    return _weighted_mean("posemap_l2", distance, cell_weights)


def _weighted_mean(where: str, cells: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    if weights is None:
        return cells.mean()
    expect_shape(where, "cell_weights", weights, cells.shape)
    return (cells * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)


def _check(where: str, predicted: torch.Tensor, target: torch.Tensor) -> None:
    if predicted.dim() != 4 or predicted.shape != target.shape or predicted.numel() == 0:
        raise ShapeError(
            f"{where}: predicted and target must both have shape (B, C, h, w), not empty; got "
            f"{tuple(predicted.shape)} and {tuple(target.shape)}"
        )
