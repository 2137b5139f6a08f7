"""Camera poses as 4x4 camera-to-world matrices, `p_world = R p_cam + t`; column 3 is the camera centre.

Convention: OpenCV camera axes (x right, y down, z forward), the world frame and unit of the dataset.
"""

from __future__ import annotations

import math

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.geometry.rotations import nearest_rotation, slerp, so3_exp

__all__ = [
    "c2w_from_vector12",
    "check_rigid",
    "interpolate_poses",
    "invert_c2w",
    "look_at",
    "make_c2w",
    "mean_pose",
    "move_poses",
    "perturb_poses",
    "pose_vector12",
    "rigid_defect",
]

_RIGID_TOLERANCE = 1e-3  # entries of R^T R - I; text files with 4 digits pass, a scaled rotation does not


def make_c2w(rotation: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Compose camera-to-world matrices from rotations (..., 3, 3) and camera centres (..., 3) -> (..., 4, 4)."""
    top = torch.cat([rotation, centre[..., None]], dim=-1)
    bottom = torch.zeros_like(top[..., :1, :])
    bottom[..., 3] = 1
    return torch.cat([top, bottom], dim=-2)


def invert_c2w(c2w: torch.Tensor) -> torch.Tensor:
    """Inverse of rigid transforms (..., 4, 4): world-to-camera from camera-to-world and back."""
    transposed = c2w[..., :3, :3].transpose(-1, -2)
    return make_c2w(transposed, -(transposed @ c2w[..., :3, 3:]).squeeze(-1))


def move_poses(c2w: torch.Tensor, rotation_vector: torch.Tensor, translation: torch.Tensor) -> torch.Tensor:
    """Poses (n, 4, 4) turned about their centres, in world axes, by (n, 3) radians, and shifted by (n, 3) world units.

    Differentiable; the parameters of a descent over poses, with zeros for the start.
    """
    return make_c2w(so3_exp(rotation_vector) @ c2w[:, :3, :3], c2w[:, :3, 3] + translation)


def pose_vector12(c2w: torch.Tensor) -> torch.Tensor:
    """Row-major top 3x4 block, the regression target: (..., 4, 4) -> (..., 12); translation at 3, 7, 11."""
    return c2w[..., :3, :].reshape(*c2w.shape[:-2], 12)


def c2w_from_vector12(vector: torch.Tensor) -> torch.Tensor:
    """Poses from regressed 12-vectors: (..., 12) -> (..., 4, 4); the 3x3 part becomes its nearest rotation.

    Raises:
        ShapeError: the last dimension is not 12.
    Differentiable. Exact inverse of `pose_vector12` for rigid poses.
    """
    if vector.shape[-1] != 12:
        raise ShapeError(f"c2w_from_vector12: vector must have shape (..., 12); got {tuple(vector.shape)}")
    top = vector.reshape(*vector.shape[:-1], 3, 4)
    return make_c2w(nearest_rotation(top[..., :3]), top[..., 3])


def perturb_poses(
    c2w: torch.Tensor,
    max_translation: float,
    max_rotation_deg: float,
    generator: torch.Generator,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Random poses around given ones (random view synthesis of DFNet, Chen et al., ECCV 2022).

        R' = Rz(c) Ry(b) Rx(a) R,   t' = t + e;   a, b, c, e_i uniform in [-max, max], independent

    Args:
        c2w: (n, 4, 4).
        max_translation: world units per axis.
        max_rotation_deg: degrees per world axis.
        generator: CPU generator; draws are made on the CPU and then moved.
        bounds: (2, 3) box [min, max] to which the new centres are clamped, or None.
    Returns:
        (n, 4, 4), same dtype and device.
    """
    expect_shape("perturb_poses", "c2w", c2w, (None, 4, 4))
    draws = torch.rand(c2w.shape[0], 6, generator=generator, dtype=torch.float64) * 2 - 1
    draws = draws.to(device=c2w.device, dtype=c2w.dtype)
    angles = draws[:, :3] * math.radians(max_rotation_deg)
    rx, ry, rz = (so3_exp(angles[:, i : i + 1] * torch.eye(3, dtype=c2w.dtype, device=c2w.device)[i]) for i in range(3))
    centre = c2w[:, :3, 3] + draws[:, 3:] * max_translation
    if bounds is not None:
        centre = torch.minimum(torch.maximum(centre, bounds[0].to(centre)), bounds[1].to(centre))
    return make_c2w(rz @ ry @ rx @ c2w[:, :3, :3], centre)


def interpolate_poses(a: torch.Tensor, b: torch.Tensor, u: torch.Tensor | float) -> torch.Tensor:
    """Poses between a and b (..., 4, 4): linear centre, slerp rotation; `u` in [0, 1], a number or (...)."""
    share = u[..., None] if isinstance(u, torch.Tensor) else u
    centre = a[..., :3, 3] + share * (b[..., :3, 3] - a[..., :3, 3])
    return make_c2w(slerp(a[..., :3, :3], b[..., :3, :3], u), centre)


def mean_pose(c2w: torch.Tensor) -> torch.Tensor:
    """Mean centre and chordal mean rotation of poses (n, 4, 4) -> (4, 4); the simplest baseline there is."""
    expect_shape("mean_pose", "c2w", c2w, (None, 4, 4))
    if c2w.shape[0] == 0:
        raise ShapeError("mean_pose: c2w must hold at least one pose; got (0, 4, 4)")
    return make_c2w(nearest_rotation(c2w[:, :3, :3].mean(0)), c2w[:, :3, 3].mean(0))


def look_at(centre: torch.Tensor, target: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Poses of cameras at `centre` that look at `target`, image top towards `up`: (..., 3) each -> (..., 4, 4).

    `up` must not be parallel to the viewing direction.
    """
    forward = torch.nn.functional.normalize(target - centre, dim=-1)
    right = torch.nn.functional.normalize(torch.linalg.cross(forward, up.expand_as(forward), dim=-1), dim=-1)
    down = torch.linalg.cross(forward, right, dim=-1)
    return make_c2w(torch.stack([right, down, forward], dim=-1), centre)


def rigid_defect(c2w: torch.Tensor, tolerance: float = _RIGID_TOLERANCE) -> str | None:
    """What keeps one 4x4 matrix from being a rigid pose, in words with the value; None when it is one."""
    if not bool(torch.isfinite(c2w).all()):
        return "has NaN or infinite entries"
    rotation = c2w[:3, :3].double()
    defect = float((rotation.T @ rotation - torch.eye(3, dtype=torch.float64, device=c2w.device)).abs().max())
    if not defect <= tolerance:  # NaN, where huge entries overflow, is none
        return f"is not rigid: R^T R differs from the identity by {defect:.3g}"
    determinant = float(torch.linalg.det(rotation))
    if determinant < 0:
        return f"is a reflection: det R = {determinant:.3g}"
    if float((c2w[3].double().cpu() - torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)).abs().max()) > tolerance:
        return f"has last row {[round(float(v), 6) for v in c2w[3]]}, expected [0, 0, 0, 1]"
    return None


def check_rigid(where: str, c2w: torch.Tensor, tolerance: float = _RIGID_TOLERANCE) -> None:
    """Raise `ShapeError` unless every matrix of `c2w` (..., 4, 4) is a finite rigid pose."""
    if c2w.shape[-2:] != (4, 4):
        raise ShapeError(f"{where}: poses must have shape (..., 4, 4); got {tuple(c2w.shape)}")
    for index, pose in enumerate(c2w.reshape(-1, 4, 4)):
        defect = rigid_defect(pose, tolerance)
        if defect:
            raise ShapeError(f"{where}: pose {index} {defect}")
