"""Whole views: colour and depth at every pixel and a PoseMap with one cell per 16 x 16 pixel block."""

from __future__ import annotations

from typing import NamedTuple

import torch

from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.render.renderer import PoseField, Renderer

__all__ = [
    "POSEMAP_STRIDE",
    "PoseMapOutput",
    "ViewOutput",
    "posemap_shape",
    "render_cells",
    "render_posemaps",
    "render_views",
]

POSEMAP_STRIDE = 16  # pixels per PoseMap cell and side (paper, section 4.1)
_CHUNK = 1 << 15  # rays rendered at once: bounds the memory of a view


class ViewOutput(NamedTuple):
    """A batch of rendered views."""

    rgb: torch.Tensor  # (B, H, W, 3) in [0, 1]
    depth: torch.Tensor  # (B, H, W) distance along the ray in world units, divided by the opacity
    opacity: torch.Tensor  # (B, H, W)
    posemap: torch.Tensor | None  # (B, 256, rows, cols)


class PoseMapOutput(NamedTuple):
    """PoseMaps and what their cells' rays meet."""

    posemap: torch.Tensor  # (B, 256, rows, cols)
    points: torch.Tensor  # (B, rows, cols, 3) at the expected depth, world frame; the camera where nothing is met
    opacity: torch.Tensor  # (B, rows, cols)


def posemap_shape(camera: Camera, stride: int = POSEMAP_STRIDE) -> tuple[int, int]:
    """Rows and columns of the PoseMap: (H // stride, W // stride), at least 1 x 1."""
    return max(1, camera.height // stride), max(1, camera.width // stride)


def _expand(appearance: torch.Tensor | None, n_rays: int) -> torch.Tensor | None:
    """(B, dim) codes of views -> (B * n_rays, dim) codes of their rays."""
    return None if appearance is None else appearance.repeat_interleave(n_rays, dim=0)


def render_posemaps(
    renderer: Renderer,
    nerfp: PoseField,
    c2w: torch.Tensor,
    camera: Camera,
    *,
    stride: int = POSEMAP_STRIDE,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """PoseMaps of a batch of poses, differentiable in `c2w` and in the pose branch.

    Args:
        c2w: (B, 4, 4) camera-to-world, world units, same dtype as the field.
        camera: the full-size camera; cells are `stride` pixels of it.
        generator: jitters the samples along the rays (training of the pose branch).
    Returns:
        (B, 256, rows, cols).
    """
    return render_cells(renderer, nerfp, c2w, camera, stride=stride, generator=generator).posemap


def render_cells(
    renderer: Renderer,
    nerfp: PoseField,
    c2w: torch.Tensor,
    camera: Camera,
    *,
    stride: int = POSEMAP_STRIDE,
    generator: torch.Generator | None = None,
) -> PoseMapOutput:
    """PoseMaps as `render_posemaps`, with the scene points that their cells show."""
    rows, cols = posemap_shape(camera, stride)
    rays_o, rays_d = camera_rays(camera, c2w, camera.cell_centers(rows, cols).to(c2w))
    out = renderer.render_rays(
        nerfp,
        rays_o.reshape(-1, 3),
        rays_d.reshape(-1, 3),
        want_rgb=False,
        want_posemap=True,
        generator=generator,
        per_sample=False,
    )
    shape = (c2w.shape[0], rows, cols)
    depth = (out.depth / out.opacity.clamp(min=1e-6))[:, None]
    points = (rays_o + depth.view(rays_d.shape[:-1])[..., None] * rays_d).view(*shape, 3)
    return PoseMapOutput(out.posemap.reshape(*shape, -1).permute(0, 3, 1, 2), points, out.opacity.view(shape))


@torch.no_grad()
def render_views(
    renderer: Renderer,
    nerfp: PoseField,
    c2w: torch.Tensor,
    camera: Camera,
    *,
    appearance: torch.Tensor | None = None,
    image_size: tuple[int, int] | None = None,
    with_posemap: bool = True,
    background: float = 0.0,
) -> ViewOutput:
    """Colour, depth, opacity and PoseMap of a batch of poses in one call (no gradient).

    Args:
        c2w: (B, 4, 4) camera-to-world.
        camera: intrinsics at the full size; the PoseMap's cells refer to it.
        appearance: (B, dim) codes or None.
        image_size: (height, width) of the colour image; default the camera's own.
        background: grey value behind what is transparent.
    """
    size = camera if image_size is None else camera.resized(image_size[1], image_size[0])
    pixels = size.pixel_grid().to(c2w)
    rays_o, rays_d = (r.reshape(-1, 3) for r in camera_rays(size, c2w, pixels))
    codes = _expand(appearance, pixels.shape[0])
    parts = []
    for start in range(0, rays_o.shape[0], _CHUNK):
        span = slice(start, start + _CHUNK)
        part = None if codes is None else codes[span]
        out = renderer.render_rays(nerfp, rays_o[span], rays_d[span], appearance=part, per_sample=False)
        parts.append(torch.cat([out.rgb, out.depth[:, None], out.opacity[:, None]], dim=1))
    flat = torch.cat(parts).reshape(c2w.shape[0], size.height, size.width, 5)
    opacity = flat[..., 4]
    posemap = render_posemaps(renderer, nerfp, c2w, camera) if with_posemap else None
    rgb = (flat[..., :3] + (1 - opacity[..., None]) * background).clamp(0, 1)
    return ViewOutput(rgb, flat[..., 3] / opacity.clamp(min=1e-6), opacity, posemap)
