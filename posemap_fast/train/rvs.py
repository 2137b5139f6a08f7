"""Random view synthesis: poses around the training poses, in free space (paper section 3.1; DFNet section 3.3).

A pose is a training pose (or one interpolated between two neighbouring ones), displaced by a uniform amount per
axis, clamped to the grown box of the training positions, and drawn again while the occupancy grid says that the
camera is inside or against a surface.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from posemap_fast.errors import ConfigError
from posemap_fast.geometry import interpolate_poses, perturb_poses
from posemap_fast.render import Renderer
from posemap_fast.seeding import integers, uniform

__all__ = ["RVSConfig", "ViewSampler"]

_TRIES = 8  # redraws of a pose that is not in free space before the training pose itself is used


@dataclass(frozen=True)
class RVSConfig:
    """Where random views are rendered."""

    max_translation: float = 0.2  # world units per axis; 0 = a share of the training positions' spread
    relative_translation: float = 0.12  # that share, of the root mean square distance from the mean position
    max_rotation_deg: float = 10.0  # per axis
    box_margin: float = 0.2  # growth of the training positions' box, world units; 0 = as max_translation
    interpolate: float = 0.0  # share of poses taken between two neighbouring training poses
    appearance: Literal["source", "random"] = "source"  # lit as the nearest training image, or as any of them
    coarseness: float = 1.0  # step along the rays of random views, in steps of the map; they are small pictures
    clearance: float = 0.0  # free space wanted around the camera, world units; 0 = a twentieth of max_translation

    def __post_init__(self) -> None:
        if not 0 <= self.interpolate <= 1:
            raise ConfigError(f"interpolate must be in [0, 1]; got {self.interpolate}")
        if not 1 <= self.coarseness <= 16:
            raise ConfigError(f"coarseness must be in [1, 16]; got {self.coarseness}")


class ViewSampler:
    """Draws poses near training poses.

    Args:
        config: ranges.
        c2w: (n, 4, 4) training poses, world frame.
        renderer: its occupancy grid decides what is free.
    """

    def __init__(self, config: RVSConfig, c2w: torch.Tensor, renderer: Renderer):
        self.config = config
        self.c2w = c2w
        self.renderer = renderer
        centres = c2w[:, :3, 3]
        spread = float((centres - centres.mean(dim=0)).square().sum(dim=1).mean().sqrt())
        self.max_translation = config.max_translation or config.relative_translation * spread
        margin = config.box_margin or self.max_translation
        self.low, self.high = centres.amin(dim=0) - margin, centres.amax(dim=0) + margin
        self.clearance = config.clearance or 0.05 * self.max_translation
        distance = torch.cdist(centres, centres) + _view_angle(c2w) * spread
        distance.fill_diagonal_(float("inf"))
        self.neighbours = distance.topk(min(4, max(1, len(c2w) - 1)), largest=False).indices  # (n, 4)

    def draw(self, n: int, generator: torch.Generator, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """`n` poses (n, 4, 4) and the index (n,) of the training view each comes from.

        Args:
            n: number of poses.
            generator: source of randomness.
            scale: multiplies both ranges.
        """
        source = integers(generator, len(self.c2w), n, self.c2w.device)
        poses = self._around(source, generator, scale)
        for _ in range(_TRIES):
            blocked = torch.nonzero(~self.is_free(poses[:, :3, 3])).flatten()
            if blocked.numel() == 0:
                break
            poses[blocked] = self._around(source[blocked], generator, scale)
        blocked = ~self.is_free(poses[:, :3, 3])
        poses[blocked] = self.c2w[source[blocked]]
        return poses, source

    def _around(self, source: torch.Tensor, generator: torch.Generator, scale: float) -> torch.Tensor:
        n = source.numel()
        base = self.c2w[source]
        if self.config.interpolate > 0 and len(self.c2w) > 1:
            pick = integers(generator, self.neighbours.shape[1], n, base.device)
            u = uniform(generator, n, device=base.device)
            chosen = uniform(generator, n, device=base.device) < self.config.interpolate
            between = interpolate_poses(base, self.c2w[self.neighbours[source, pick]], u)
            base = torch.where(chosen[:, None, None], between, base)
        poses = perturb_poses(base, scale * self.max_translation, scale * self.config.max_rotation_deg, generator)
        poses = poses.clone()
        poses[:, :3, 3] = torch.minimum(torch.maximum(poses[:, :3, 3], self.low), self.high)
        return poses

    def is_free(self, centres: torch.Tensor) -> torch.Tensor:
        """(n, 3) world points -> (n,) bool: nothing within `clearance` along the axes."""
        unit = torch.eye(3, device=centres.device)
        offsets = torch.cat([torch.zeros_like(unit[:1]), unit, -unit]) * self.clearance
        points = (centres[:, None] + offsets).reshape(-1, 3)
        occupied = self.renderer.occupancy.is_occupied(self.renderer.frame.to_field(points))
        return ~occupied.reshape(-1, offsets.shape[0]).any(dim=1)


def _view_angle(c2w: torch.Tensor) -> torch.Tensor:
    """(n, n) angles between viewing directions, radians."""
    forward = c2w[:, :3, 2]
    return torch.arccos((forward @ forward.T).clamp(-1, 1))
