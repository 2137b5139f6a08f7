"""Pose from points: Gauss-Newton on the angles between seen and predicted directions, with a prior on the pose.

    min over R, t   sum_i w_i rho(|e_i| / s) + |p (R0^T R, R^T (t - t0))|^2,   e_i = B_i^T P_i / (d_i . P_i)

where P_i = R^T (X_i - t) is a predicted scene point in the camera, d_i the ray of its cell, B_i (3, 2) a basis of the
plane across d_i, so e_i is the offset on that plane at distance 1 (the angle in radians where it is small), and rho is
Cauchy's robust loss by iteratively reweighted least squares. It is differentiable: every step is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from posemap_fast.checks import expect_shape
from posemap_fast.geometry import so3_exp

__all__ = ["SolvedPose", "solve_pose"]

_NEAREST = 0.05  # least distance of a point along its ray; points behind the camera are taken to lie there
_LONGEST_STEP = 0.5  # radians and pose-frame units together
_TINY = 1e-12  # of the weights' sum, where there are none
_FAR = 1e3  # offsets and points beyond it are cut there: one wild point must not make the equations singular


class SolvedPose(NamedTuple):
    """The pose and how well it is determined."""

    rotation: torch.Tensor  # (B, 3, 3) camera to scene
    position: torch.Tensor  # (B, 3)
    information: torch.Tensor  # (B, 6, 6) of (rotation, translation) in camera axes: J^T W J and the prior
    misfit: torch.Tensor  # (B,) mean squared offset that is left, robust and weighted, radian^2


def solve_pose(
    points: torch.Tensor,
    weights: torch.Tensor,
    directions: torch.Tensor,
    rotation: torch.Tensor,
    position: torch.Tensor,
    precision: torch.Tensor,
    *,
    iterations: int,
    scale: float,
) -> SolvedPose:
    """Move poses so that predicted scene points are seen where the image shows them.

    Args:
        points: (B, n, 3) scene points, any unit.
        weights: (B, n) >= 0, 1 / radian^2.
        directions: (n, 3) unit rays of the cells in camera axes.
        rotation, position: (B, 3, 3) and (B, 3), camera to scene: start and prior.
        precision: (6,) > 0 of the prior: three rotations (1 / radian^2), three translations (1 / unit^2).
        iterations: >= 1.
        scale: s, radians.
    Returns:
        The poses; where all weights are 0, the prior. Points that are not finite have no say.
    Raises:
        ShapeError: shapes that do not fit.
    """
    n = directions.shape[0]
    expect_shape("solve_pose", "points", points, (None, n, 3))
    expect_shape("solve_pose", "weights", weights, (points.shape[0], n))
    is_finite = torch.isfinite(points).all(dim=-1)
    points = torch.where(is_finite[..., None], points, torch.zeros_like(points)).clamp(-_FAR, _FAR)
    weights = weights * is_finite
    across = _plane(directions)  # (n, 2, 3)
    first, start = rotation, position
    information = torch.diag(precision).expand(len(points), 6, 6)
    for _ in range(iterations):
        local, depth, inverse, offset = _offsets(points, rotation, position, directions, across)
        jacobian = _jacobian(local, inverse, (depth > _NEAREST).to(depth), offset, across, directions)
        reweighted = _reweighted(weights, offset, scale)
        weighted = jacobian * reweighted[..., None, None]
        information = torch.einsum("bnki,bnkj->bij", weighted, jacobian) + torch.diag(precision)
        pull = torch.cat([_small_rotation(first, rotation), _to_camera(rotation, position - start)], dim=-1)
        gradient = torch.einsum("bnki,bnk->bi", weighted, offset) + precision * pull
        step = -torch.linalg.solve_ex(information, gradient).result  # no wait for the device
        step = step * (_LONGEST_STEP / step.norm(dim=-1, keepdim=True).clamp(min=_LONGEST_STEP))
        position = position + torch.einsum("bij,bj->bi", rotation, step[:, 3:])
        rotation = rotation @ so3_exp(step[:, :3])
    offset = _offsets(points, rotation, position, directions, across)[-1]
    left = (_reweighted(weights, offset, scale) * offset.square().sum(-1)).sum(-1)
    return SolvedPose(rotation, position, information, left / weights.sum(-1).clamp(min=_TINY))


def _offsets(
    points: torch.Tensor, rotation: torch.Tensor, position: torch.Tensor, directions: torch.Tensor, across: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Points in the camera (B, n, 3), their depth along the rays and its inverse (B, n, 1), their offsets (B, n, 2)."""
    local = (points - position[:, None]) @ rotation  # R^T (X - t)
    depth = (local * directions).sum(-1, keepdim=True)
    inverse = 1 / depth.clamp(min=_NEAREST)
    return local, depth, inverse, (torch.einsum("nkj,bnj->bnk", across, local) * inverse).clamp(-_FAR, _FAR)


def _reweighted(weights: torch.Tensor, offset: torch.Tensor, scale: float) -> torch.Tensor:
    """Cauchy's weights (B, n) of offsets (B, n, 2)."""
    return weights / (1 + offset.square().sum(-1) / scale**2)


def _plane(directions: torch.Tensor) -> torch.Tensor:
    """(n, 2, 3) orthonormal vectors across unit directions (n, 3)."""
    least = functional.one_hot(directions.abs().argmin(dim=-1), 3).to(directions)
    first = functional.normalize(torch.linalg.cross(least, directions), dim=-1)
    return torch.stack([first, torch.linalg.cross(directions, first)], dim=-2)


def _jacobian(
    local: torch.Tensor,
    inverse: torch.Tensor,
    is_ahead: torch.Tensor,
    offset: torch.Tensor,
    across: torch.Tensor,
    directions: torch.Tensor,
) -> torch.Tensor:
    """(B, n, 2, 6) derivative of the offsets by a turn and a shift of the camera in its own axes.

    P(w, v) = exp(-w) (P - v), so dP = P x w - v; e = B^T P / z with z = d . P, so de = (B^T dP - e d^T dP) / z.
    """
    rows = across - is_ahead[..., None] * offset[..., None] * directions[:, None]  # (B, n, 2, 3)
    turn = torch.linalg.cross(rows, local[..., None, :].expand_as(rows))  # row . (P x w) = (row x P) . w
    return torch.cat([turn, -rows], dim=-1) * inverse[..., None]


def _small_rotation(first: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """(B, 3) axis of R0^T R times the sine of its angle, which is the rotation vector where it is small."""
    relative = first.transpose(1, 2) @ rotation
    odd = relative - relative.transpose(1, 2)
    return torch.stack([odd[:, 2, 1], odd[:, 0, 2], odd[:, 1, 0]], dim=-1) / 2


def _to_camera(rotation: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bji,bj->bi", rotation, vector)
