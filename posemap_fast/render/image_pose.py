"""Poses of images by render and compare: a given pose is moved until the map's picture looks like the image.

All images of a batch descend at once, coarse to fine: pictures are compared after a Gaussian blur that narrows from
step to step, and after their mean colour and contrast are taken out, so that exposure does not count. The gradient
reaches the poses through the rays, the hash grid and the compositing weights (as iNeRF, Yen-Chen et al. 2021,
arXiv:2012.05877, but whole small pictures instead of random pixels).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera, camera_rays, move_poses
from posemap_fast.render.renderer import PoseField, Renderer

__all__ = ["ImagePoseConfig", "RefinedPoses", "refine_poses"]

_BETAS = (0.8, 0.95)  # of Adam: short memory, the picture changes along the way
_LEAST_CONTRAST = 0.02
_HUBER_DELTA = 0.5  # of normalised colours, whose standard deviation is 1


@dataclass(frozen=True)
class ImagePoseConfig:
    """Schedule of the descent."""

    steps: int = 40
    rows: int = 36  # px, height of the compared pictures
    blur_px: tuple[float, float] = (2.0, 0.5)  # standard deviation at the first and the last step, px of them
    step_t: float = 0.01  # Adam's first steps, share of the spread of the training cameras
    step_r_deg: float = 0.3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < 4:
            raise ConfigError(f"image pose: steps must be >= 1 and rows >= 4; got {self.steps} and {self.rows}")
        if len(self.blur_px) != 2 or min(self.blur_px) <= 0:
            raise ConfigError(f"image pose: blur_px must be two numbers > 0; got {self.blur_px}")


class RefinedPoses(NamedTuple):
    """Ends of the descent."""

    c2w: torch.Tensor  # (n, 4, 4)
    difference: torch.Tensor  # (n,) between picture and image at the end, both at the last blur
    difference_before: torch.Tensor  # (n,) the same at the start


def refine_poses(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    images: torch.Tensor,
    codes: torch.Tensor | None,
    start: torch.Tensor,
    scale: float,
    config: ImagePoseConfig,
) -> RefinedPoses:
    """Move poses until the map looks like the images from there.

    Args:
        images: (n, 3, H, W) float in [0, 1], of `camera`'s aspect ratio.
        codes: (n, dim) appearance codes of the images, or None.
        start: (n, 4, 4) float32 camera-to-world, world frame.
        scale: world units by which `config.step_t` is multiplied.
    Returns:
        RefinedPoses; images do not influence each other.
    """
    size = camera.resized(max(1, round(config.rows * camera.width / camera.height)), config.rows)
    wanted = functional.interpolate(
        images, size=(size.height, size.width), mode="bilinear", antialias=True, align_corners=False
    )
    rates = (math.radians(config.step_r_deg), config.step_t * scale)
    turn, move = (torch.zeros(len(start), 3, device=start.device, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip((turn, move), rates, strict=True)], betas=_BETAS
    )
    first, last = config.blur_px
    with torch.no_grad():
        before = _difference(_pictures(renderer, nerfp, size, start, codes), wanted, last)
    for k in range(config.steps):
        factor = max(0.02, 0.5 * (1 + math.cos(math.pi * k / config.steps)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        blur = first * (last / first) ** (k / max(1, config.steps - 1))
        pictures = _pictures(renderer, nerfp, size, move_poses(start, turn, move), codes)
        loss = _difference(pictures, wanted, blur).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        end = move_poses(start, turn, move)
        after = _difference(_pictures(renderer, nerfp, size, end, codes), wanted, last)
    return RefinedPoses(end, after, before)


def _pictures(
    renderer: Renderer, nerfp: PoseField, size: Camera, c2w: torch.Tensor, codes: torch.Tensor | None
) -> torch.Tensor:
    """(n, 3, h, w), differentiable in the poses."""
    rays_o, rays_d = camera_rays(size, c2w, size.pixel_grid().to(c2w))
    n_pixels = size.height * size.width
    out = renderer.render_rays(
        nerfp,
        rays_o.reshape(-1, 3),
        rays_d.reshape(-1, 3),
        appearance=None if codes is None else codes.repeat_interleave(n_pixels, dim=0),
    )
    return out.rgb.reshape(len(c2w), size.height, size.width, 3).permute(0, 3, 1, 2)


def _difference(pictures: torch.Tensor, images: torch.Tensor, blur: float) -> torch.Tensor:
    """(n,) mean Huber distance of normalised, blurred pictures."""
    a, b = (_normalised(_blurred(x, blur)) for x in (pictures, images))
    apart = functional.huber_loss(a, b, reduction="none", delta=_HUBER_DELTA)
    return apart.mean(dim=(1, 2, 3)) / _HUBER_DELTA


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """Without the mean colour, and with a standard deviation of 1 over all channels."""
    contrast = images.std(dim=(1, 2, 3), keepdim=True)
    return (images - images.mean(dim=(2, 3), keepdim=True)) / (contrast + _LEAST_CONTRAST)


def _blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur with replicated borders."""
    reach = max(1, math.ceil(2.5 * sigma))
    x = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)
