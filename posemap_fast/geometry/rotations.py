"""Rotations: nearest rotation with a stable gradient, quaternions (w, x, y, z), exponential map, slerp, angles.

Convention: matrices act on column vectors; `matrix_from_quaternion((cos 45deg, 0, 0, sin 45deg))` turns x into y.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = [
    "matrix_from_quaternion",
    "nearest_rotation",
    "quaternion_from_matrix",
    "rotation_angle_deg",
    "slerp",
    "so3_exp",
    "so3_log",
]

_SMALL_ANGLE = 1e-4  # rad; below it the Taylor series is exact to float64 rounding


class _NearestRotation(torch.autograd.Function):
    """Polar factor with determinant +1; see `nearest_rotation`."""

    @staticmethod
    def forward(ctx: Any, matrix: torch.Tensor) -> torch.Tensor:
        u, singular, vt = torch.linalg.svd(matrix)
        sign = torch.where(torch.linalg.det(u @ vt) < 0, -1.0, 1.0).to(matrix.dtype)
        signed = torch.cat([singular[..., :2], singular[..., 2:] * sign[..., None]], dim=-1)
        u = torch.cat([u[..., :2], u[..., 2:] * sign[..., None, None]], dim=-1)
        rotation = u @ vt
        ctx.save_for_backward(rotation, signed, vt)
        return rotation

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        rotation, signed, vt = ctx.saved_tensors
        v = vt.transpose(-1, -2)
        sums = signed[..., :, None] + signed[..., None, :]
        root = torch.finfo(sums.dtype).eps ** 0.5
        floor = root * signed[..., :1, None].clamp_min(root)
        x = vt @ rotation.transpose(-1, -2) @ grads[0] @ v
        skew = (x - x.transpose(-1, -2)) / torch.maximum(sums, floor)
        return rotation @ v @ skew @ vt


def nearest_rotation(matrix: torch.Tensor) -> torch.Tensor:
    """Rotation nearest to a matrix in the Frobenius norm, determinant +1 (Levinson et al., NeurIPS 2020).

        M = U S V^T,   R = U diag(1, 1, det(U V^T)) V^T

    The gradient uses the signed singular values p = (s1, s2, +-s3): with X = V^T R^T (dL/dR) V it is
    R V [(X - X^T)_ij / (p_i + p_j)] V^T. It has no 1 / (s_i - s_j), so equal singular values are no special
    case; only where the nearest rotation itself is (nearly) not unique, p2 + p3 ~ 0, is it bounded instead of exact.

    Args:
        matrix: (..., 3, 3) float32/64, finite.
    Returns:
        (..., 3, 3) rotations.
    Differentiable once.
    """
    return _NearestRotation.apply(matrix)


def quaternion_from_matrix(rotation: torch.Tensor) -> torch.Tensor:
    """Unit quaternions (w, x, y, z) with w >= 0 of rotation matrices (..., 3, 3) -> (..., 4).

    Takes the largest of the four equivalent forms (Shepperd, 1978), so every angle up to 180 deg is exact.
    """
    m = rotation
    m00, m11, m22 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    xy, xz, yz = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    wx, wy, wz = m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]
    forms = torch.stack(
        [  # row k is 4 q_k (w, x, y, z)
            torch.stack([1 + m00 + m11 + m22, wx, wy, wz], dim=-1),
            torch.stack([wx, 1 + m00 - m11 - m22, xy, xz], dim=-1),
            torch.stack([wy, xy, 1 - m00 + m11 - m22, yz], dim=-1),
            torch.stack([wz, xz, yz, 1 - m00 - m11 + m22], dim=-1),
        ],
        dim=-2,
    )
    best = torch.diagonal(forms, dim1=-2, dim2=-1).argmax(dim=-1)
    index = best[..., None, None].expand(*best.shape, 1, 4)
    quaternion = torch.nn.functional.normalize(forms.gather(-2, index).squeeze(-2), dim=-1)
    return torch.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def matrix_from_quaternion(quaternion: torch.Tensor) -> torch.Tensor:
    """Rotation matrices of quaternions (w, x, y, z), normalised first: (..., 4) -> (..., 3, 3)."""
    w, x, y, z = torch.nn.functional.normalize(quaternion, dim=-1).unbind(-1)
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)], dim=-1),
        torch.stack([2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)], dim=-1),
        torch.stack([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def _hat(vector: torch.Tensor) -> torch.Tensor:
    """Cross-product matrices: hat(v) u = v x u."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def so3_exp(rotation_vector: torch.Tensor) -> torch.Tensor:
    """Rodrigues' formula: rotation vectors in radians (..., 3) -> (..., 3, 3); smooth at zero."""
    squared = (rotation_vector * rotation_vector).sum(-1)
    is_small = squared < _SMALL_ANGLE**2
    angle = torch.where(is_small, torch.ones_like(squared), squared).sqrt()
    sine = torch.where(is_small, 1 - squared / 6, torch.sin(angle) / angle)[..., None, None]
    cosine = torch.where(is_small, 0.5 - squared / 24, (1 - torch.cos(angle)) / angle**2)[..., None, None]
    hat = _hat(rotation_vector)
    identity = torch.eye(3, dtype=hat.dtype, device=hat.device)
    return identity + sine * hat + cosine * (hat @ hat)


def so3_log(rotation: torch.Tensor) -> torch.Tensor:
    """Rotation vectors in radians, of length <= pi: (..., 3, 3) -> (..., 3); smooth at the identity."""
    quaternion = quaternion_from_matrix(rotation)
    w, v = quaternion[..., 0], quaternion[..., 1:]
    squared = (v * v).sum(-1)
    is_small = squared < _SMALL_ANGLE**2
    sine = torch.where(is_small, torch.ones_like(squared), squared).sqrt()
    safe_w = w.clamp_min(torch.finfo(w.dtype).tiny)
    series = 2 / safe_w * (1 - squared / (3 * safe_w**2))
    factor = torch.where(is_small, series, 2 * torch.atan2(sine, w) / sine)
    return factor[..., None] * v


def slerp(a: torch.Tensor, b: torch.Tensor, u: torch.Tensor | float) -> torch.Tensor:
    """Shortest path from rotations a to b (..., 3, 3) at constant speed; u = 0 gives a, u = 1 gives b.

    `u` is a number or broadcasts against the leading dimensions.
    """
    vector = so3_log(a.transpose(-1, -2) @ b)
    share = u[..., None] if isinstance(u, torch.Tensor) else u
    return a @ so3_exp(share * vector)


def rotation_angle_deg(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Angle between rotations (..., 3, 3) in degrees, in [0, 180]; accurate at both ends. NaN stays NaN.

    With M = A^T B: sin(angle) = |M - M^T|_F / (2 sqrt 2) and cos(angle) = (trace M - 1) / 2.
    """
    relative = a.mT @ b
    sine = torch.linalg.matrix_norm(relative - relative.mT) / 8**0.5
    cosine = (relative.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
    return torch.rad2deg(torch.atan2(sine, cosine))
