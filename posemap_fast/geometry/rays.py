"""Rays through pixels and their inverse, the projection of points."""

from __future__ import annotations

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.geometry.cameras import Camera

__all__ = ["camera_rays", "project_points"]


def camera_rays(camera: Camera, c2w: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """World rays through image points.

        d_cam = ((u - cx) / fx, (v - cy) / fy, 1),   d = R d_cam / |d_cam|,   o = t

    Args:
        camera: intrinsics in the pixels that `pixels` counts.
        c2w: (..., 4, 4) float32/64, OpenCV camera-to-world.
        pixels: (n, 2) image points (x, y); a pixel's centre is at +0.5.
    Returns:
        rays_o, rays_d: (..., n, 3) in the dtype of `c2w`; rays_d has unit length.
    Raises:
        ShapeError: wrong shapes.
    Differentiable in c2w and pixels.
    """
    if c2w.shape[-2:] != (4, 4):
        raise ShapeError(f"camera_rays: c2w must have shape (..., 4, 4); got {tuple(c2w.shape)}")
    expect_shape("camera_rays", "pixels", pixels, (None, 2))
    points = pixels.to(dtype=c2w.dtype, device=c2w.device)
    x, y = (points[:, 0] - camera.cx) / camera.fx, (points[:, 1] - camera.cy) / camera.fy
    local = torch.nn.functional.normalize(torch.stack([x, y, torch.ones_like(x)], dim=-1), dim=-1)  # (n, 3)
    rays_d = local @ c2w[..., :3, :3].transpose(-1, -2)  # (..., n, 3)
    return c2w[..., None, :3, 3].expand_as(rays_d), rays_d


def project_points(camera: Camera, c2w: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Image points and z-depths of world points seen from poses.

    Args:
        c2w: (..., 4, 4) OpenCV camera-to-world.
        points: (n, 3) or (..., n, 3), world frame.
    Returns:
        (..., n, 2) image points, (..., n) depths along the camera's z axis; a point is visible only where depth > 0.
    """
    local = (points.to(c2w) - c2w[..., None, :3, 3]) @ c2w[..., :3, :3]  # R^T (p - t)
    depth = local[..., 2]
    safe = torch.where(depth.abs() < 1e-12, torch.full_like(depth, 1e-12), depth)
    u = local[..., 0] / safe * camera.fx + camera.cx
    v = local[..., 1] / safe * camera.fy + camera.cy
    return torch.stack([u, v], dim=-1), depth
