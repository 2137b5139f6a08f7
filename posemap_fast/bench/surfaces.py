"""A map of the scene `room` from a fraction of the preset's training: its occupancy grid starts near the surfaces.

Most of stage 1 is spent on finding out what is empty. A benchmark needs a map whose rays march about as many samples as
those of the preset `cpu`, and the room's surfaces are known.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

from posemap_fast.data.room.layout import clearance
from posemap_fast.geometry import SceneFrame
from posemap_fast.render import Renderer

__all__ = ["SHORT", "start_near_surfaces"]

SHORT = (
    "nerf.steps=200",
    "nerf.samples_per_step=32768",
    "nerf.coarse=[0,0]",
    "render.occupancy.update_every=8",
    "render.occupancy.decay=0.8",
)
"""Overrides of the preset `cpu` that are enough then."""
_SHELL = 1.75  # cells of the occupancy grid around the true surfaces that may be occupied


def start_near_surfaces(renderer: Renderer) -> None:
    """Mark all cells as empty for good that are away from the room's surfaces; before training."""
    cell = 1 / (renderer.config.occupancy.resolution * renderer.frame.scale)
    renderer.occupancy.restrict(functools.partial(_is_near, renderer.frame, _SHELL * cell))


def _is_near(frame: SceneFrame, distance: float, x: torch.Tensor) -> torch.Tensor:
    """(n, 3) in the unit cube -> (n,) bool: a surface of the room is nearer than `distance`, metres."""
    away = clearance(frame.to_world(x).double().cpu().numpy())
    return torch.from_numpy(np.abs(away) < distance).to(x.device)
