"""Distances between regressed and true 12-vectors, row-major [R | t], translation at 3, 7, 11.

Both forms work on the residual r = [w_R (R_hat - R) | w_t (t_hat - t)]: the weights multiply entries, so
w_t / w_R says how many rotation entries a unit of translation is worth (1 in the paper, where the unit is 1 m).
"""

from __future__ import annotations

import torch

from posemap_fast.errors import ShapeError

__all__ = ["pose_l2", "pose_mse"]


def pose_l2(
    predicted: torch.Tensor, target: torch.Tensor, translation_weight: float = 1.0, rotation_weight: float = 1.0
) -> torch.Tensor:
    """Mean over the batch of the norm of the residual (PoseMap, arXiv:2403.12800, L_pose): mean_b |r_b|_2.

    Args:
        predicted, target: (B, 12), B > 0.
    Returns:
        Scalar; the gradient is 0 where a residual is 0.
    """
    residual = _residual("pose_l2", predicted, target, translation_weight, rotation_weight)
    return torch.linalg.vector_norm(residual, dim=-1).mean()


def pose_mse(
    predicted: torch.Tensor, target: torch.Tensor, translation_weight: float = 1.0, rotation_weight: float = 1.0
) -> torch.Tensor:
    """Mean over batch and entries of r^2, the form in DFNet's code (arXiv:2204.00559); arguments as `pose_l2`."""
    return _residual("pose_mse", predicted, target, translation_weight, rotation_weight).square().mean()


def _residual(
    where: str, predicted: torch.Tensor, target: torch.Tensor, translation_weight: float, rotation_weight: float
) -> torch.Tensor:
    if predicted.dim() != 2 or predicted.shape[1] != 12 or predicted.shape != target.shape or not len(predicted):
        raise ShapeError(
            f"{where}: predicted and target must both have shape (B, 12), B > 0; got {tuple(predicted.shape)} "
            f"and {tuple(target.shape)}"
        )
    row = [rotation_weight, rotation_weight, rotation_weight, translation_weight]
    weights = torch.tensor(row * 3, dtype=predicted.dtype, device=predicted.device)
    return (predicted - target) * weights
