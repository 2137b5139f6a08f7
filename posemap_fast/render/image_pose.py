"""Poses of images by render and compare: a given pose is moved until the map's picture looks like the image.

    picture of the map at the pose, with depth -> direct alignment (`render.picture_alignment`) -> a better pose, ...

in rounds from small and blurred pictures, which lead home from far, to larger and sharper ones. Pictures are compared
after their mean colour and contrast are taken out, so that exposure does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera, camera_rays, make_c2w, so3_exp
from posemap_fast.render.picture_alignment import Picture, align_to_images, blurred, huber, normalised
from posemap_fast.render.renderer import PoseField, RayOutput, Renderer

__all__ = ["ImagePoseConfig", "RefinedPoses", "picture_differences", "refine_poses", "search_poses"]

_ROUNDS = ((4, 2.5), (4, 1.2), (2, 1.0), (1, 0.8))  # part of the rows, and blur in px of the smaller picture
_JUDGED_ROWS = 48  # at which start and end are compared, whatever the schedule: differences of maps compare
_FEWEST_ROWS = 24  # of smaller pictures
_LEAST_ROWS = 8  # of the largest
_COARSENESS = 2.0  # ray steps are so many times as long as the map's: half the time, and poses as good
_MOST_SHRUNK = 64  # times at once; torch's CUDA kernel has room for 94
_RAYS = 1 << 15  # rendered at a time; bounds the memory
_STARTS, _SEARCHED = 16, 2  # drawn around a doubtful one; rounds after which the best of them is chosen
_MOVE, _TURN_DEG = 0.12, 5.0  # farthest start: share of the median depth, per axis, and angle about each
_SOLID = 0.5  # opacity of a pixel whose depth counts
_FUZZY = 0.05  # spread of depth along a ray, share of the depth: such a pixel counts half


@dataclass(frozen=True)
class ImagePoseConfig:
    """Schedule of render and compare."""

    steps: int = 8  # of Levenberg and Marquardt, in each of four rounds
    rows: int = 96  # px, height of the largest pictures; at most the images'

    def __post_init__(self) -> None:
        if self.steps < 1 or self.rows < _LEAST_ROWS:
            raise ConfigError(
                f"image pose: steps must be >= 1 and rows >= {_LEAST_ROWS}; got {self.steps} and {self.rows}"
            )


class RefinedPoses(NamedTuple):
    """Ends of render and compare."""

    c2w: torch.Tensor  # (n, 4, 4)
    difference: torch.Tensor  # (n,) between picture and image at the end: Huber distance of normalised colours
    difference_before: torch.Tensor  # (n,) the same at the start
    sigma: torch.Tensor  # (n, 2) of the end, world units and degrees, see `AlignedPoses`


@torch.no_grad()
def refine_poses(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    images: torch.Tensor,
    codes: torch.Tensor | None,
    start: torch.Tensor,
    config: ImagePoseConfig,
) -> RefinedPoses:
    """Move poses until the map looks like the images from there.

    Args:
        images: (n, 3, H, W) float in [0, 1], of `camera`'s aspect ratio.
        codes: (n, dim) appearance codes of the images, or None.
        start: (n, 4, 4) float32 camera-to-world, world frame.
    Returns:
        RefinedPoses; images do not influence each other.
    """
    compared = _Compared(renderer.at_coarseness(_COARSENESS), nerfp, camera, images, codes, config)
    before = compared.difference(start)
    c2w, sigma = compared.moved(start, _ROUNDS)
    return RefinedPoses(c2w, compared.difference(c2w), before, sigma)


@torch.no_grad()
def search_poses(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    images: torch.Tensor,
    codes: torch.Tensor | None,
    around: torch.Tensor,
    config: ImagePoseConfig,
) -> torch.Tensor:
    """Better starts for `refine_poses`, by small pictures, where it went astray from `around`; arguments as there.

    A start leads home from about a tenth of the picture's width away, so others are drawn about so far around it, moved
    by the first rounds, and the one counts whose small picture looks most like the image.

    Returns:
        (n, 4, 4).
    """
    n = len(around)
    config = dataclasses.replace(config, rows=_FEWEST_ROWS)
    compared = _Compared(renderer.at_coarseness(_COARSENESS), nerfp, camera, images, codes, config)
    draws = torch.rand(_STARTS, 6, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(around)
    draws[0] = 0
    turns = so3_exp(math.radians(_TURN_DEG) * draws[:, :3])
    moves = _MOVE * compared.depth(around)[:, None, None] * draws[:, 3:]
    rotation, centre = around[:, None, :3, :3] @ turns, around[:, None, :3, 3] + moves
    starts = make_c2w(rotation.flatten(0, 1), centre.flatten(0, 1))
    repeated = compared.repeated(_STARTS)
    ends, _ = repeated.moved(starts, _ROUNDS[:_SEARCHED])
    best = repeated.difference(ends).view(n, _STARTS).argmin(dim=1)
    return ends.view(n, _STARTS, 4, 4)[torch.arange(n, device=best.device), best]


@torch.no_grad()
def picture_differences(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    images: torch.Tensor,
    codes: torch.Tensor | None,
    c2w: torch.Tensor,
    config: ImagePoseConfig,
) -> torch.Tensor:
    """(n,) how much the map's pictures from `c2w` differ from the images, as `RefinedPoses.difference`."""
    compared = _Compared(renderer.at_coarseness(_COARSENESS), nerfp, camera, images, codes, config)
    return compared.difference(c2w)


@dataclass(frozen=True)
class _Compared:
    """Images, and the map that they are compared with; a part divides the rows of the largest pictures."""

    renderer: Renderer
    nerfp: PoseField
    camera: Camera
    images: torch.Tensor  # (n, 3, H, W) in [0, 1]
    codes: torch.Tensor | None  # (n, dim)
    config: ImagePoseConfig

    def repeated(self, times: int) -> _Compared:
        """With each image so many times, one after the other, and no larger than it is looked at."""
        codes = None if self.codes is None else self.codes.repeat_interleave(times, dim=0)
        images = _shrunk(self.images, self._size(1))
        return dataclasses.replace(self, images=images.repeat_interleave(times, dim=0), codes=codes)

    def moved(self, c2w: torch.Tensor, rounds: Sequence[tuple[int, float]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses after alignment in some rounds, and their sigma (n, 2), see `AlignedPoses`."""
        sigma = c2w.new_zeros(len(c2w), 2)
        for part, blur in rounds:
            size = self._size(part)
            picture = _picture(self.renderer, self.nerfp, size, c2w, self.codes)
            found = align_to_images(
                size, picture, _shrunk(self.images, size), c2w, blur_px=blur, steps=self.config.steps
            )
            c2w, sigma = found.c2w, found.sigma
        return c2w, sigma

    def difference(self, c2w: torch.Tensor) -> torch.Tensor:
        """(n,) of the map's pictures from these poses and the images: mean Huber distance."""
        size, blur = self._of_rows(min(_JUDGED_ROWS, self.images.shape[2], self.camera.height)), _ROUNDS[-1][1]
        pictures = _rendered(self.renderer, self.nerfp, size, c2w, self.codes).rgb
        apart = normalised(blurred(pictures, blur)) - normalised(blurred(_shrunk(self.images, size), blur))
        return huber(apart).mean(dim=(1, 2, 3))

    def depth(self, c2w: torch.Tensor) -> torch.Tensor:
        """(n,) median depth of what small pictures show, world units; the unit cube's size where they show nothing."""
        seen = _rendered(self.renderer, self.nerfp, self._size(_ROUNDS[0][0]), c2w, self.codes)
        depth = seen.depth.masked_fill(seen.opacity < _SOLID, math.nan).nanmedian(dim=1).values
        return depth.nan_to_num(nan=float(self.renderer.frame.length_to_world(1.0)))

    def _size(self, part: int) -> Camera:
        """Of pictures with a part of the rows, as long as these are enough."""
        most = min(self.config.rows, self.camera.height)
        return self._of_rows(min(most, max(_FEWEST_ROWS, most // part)))

    def _of_rows(self, rows: int) -> Camera:
        return self.camera.resized(max(1, round(rows * self.camera.width / self.camera.height)), rows)


def _shrunk(images: torch.Tensor, size: Camera) -> torch.Tensor:
    """Images at a smaller size, in two steps where one is more than torch's CUDA kernel has room for."""
    if images.shape[2] > _MOST_SHRUNK * size.height or images.shape[3] > _MOST_SHRUNK * size.width:
        images = _resized(images, 8 * size.height, 8 * size.width)
    return _resized(images, size.height, size.width)


def _resized(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return functional.interpolate(images, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def _picture(
    renderer: Renderer, nerfp: PoseField, size: Camera, c2w: torch.Tensor, codes: torch.Tensor | None
) -> Picture:
    """What the map looks like from `c2w`, with the place of each pixel."""
    seen = _rendered(renderer, nerfp, size, c2w, codes)
    weights = seen.opacity / (1 + (seen.spread / (_FUZZY * seen.depth)).square())
    _, local = camera_rays(size, torch.eye(4).to(c2w), size.pixel_grid().to(c2w))
    return Picture(seen.rgb, local * seen.depth[..., None], weights)


class _Rendered(NamedTuple):
    """Pictures with what is known of their pixels' depths, world units along the ray."""

    rgb: torch.Tensor  # (n, 3, h, w)
    opacity: torch.Tensor  # (n, h * w)
    depth: torch.Tensor  # (n, h * w) mean, > 0
    spread: torch.Tensor  # (n, h * w) standard deviation


def _rendered(
    renderer: Renderer, nerfp: PoseField, size: Camera, c2w: torch.Tensor, codes: torch.Tensor | None
) -> _Rendered:
    n, n_pixels = len(c2w), size.height * size.width
    rays_o, rays_d = camera_rays(size, c2w, size.pixel_grid().to(c2w))
    rays_o, rays_d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
    appearance = None if codes is None else codes.repeat_interleave(n_pixels, dim=0)
    parts = []
    for first in range(0, len(rays_o), _RAYS):
        part = slice(first, first + _RAYS)
        code = None if appearance is None else appearance[part]
        out = renderer.render_rays(nerfp, rays_o[part], rays_d[part], appearance=code)
        parts.append(torch.cat([out.rgb, torch.stack([out.opacity, *_depth(renderer, out)], dim=1)], dim=1))
    found = torch.cat(parts).reshape(n, n_pixels, 6)
    rgb = found[..., :3].reshape(n, size.height, size.width, 3).permute(0, 3, 1, 2)
    return _Rendered(rgb, *found[..., 3:].unbind(dim=-1))


def _depth(renderer: Renderer, out: RayOutput) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_rays,) mean and standard deviation of the distance at which rays end, world units; the mean is > 0."""
    opacity = out.opacity.clamp(min=1e-6)
    depth = (out.depth / opacity).clamp(min=1e-6)
    ends = out.samples.t_starts + out.samples.t_ends
    middles = torch.as_tensor(renderer.frame.length_to_world(0.5 * ends))
    apart = out.weights * (middles - depth[out.samples.ray_indices]).square()
    variance = torch.zeros_like(depth).index_add_(0, out.samples.ray_indices, apart) / opacity
    return depth, variance.clamp(min=0).sqrt()
