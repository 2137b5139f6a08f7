"""A grid that starts near the room's surfaces has the cells there and no others."""

from __future__ import annotations

import torch

from posemap_fast.bench.surfaces import start_near_surfaces
from posemap_fast.data.room.layout import clearance
from posemap_fast.geometry import SceneFrame
from posemap_fast.render import OccupancyConfig, RenderConfig, Renderer

CELLS = 16


def test_cells_near_surfaces_are_left() -> None:
    frame = SceneFrame(scale=0.1, offset=torch.full((3,), 0.5))
    renderer = Renderer(RenderConfig(occupancy=OccupancyConfig(resolution=CELLS)), frame, near=0.1)
    start_near_surfaces(renderer)
    side = torch.arange(CELLS)
    cells = torch.stack(torch.meshgrid(side, side, side, indexing="ij"), dim=-1).reshape(-1, 3)
    centers = (cells + 0.5) / CELLS
    left = renderer.occupancy.is_occupied(centers)
    away = torch.from_numpy(clearance(frame.to_world(centers).double().numpy())).abs()
    cell = 1 / (CELLS * frame.scale)
    assert 0 < left.sum() < len(left)
    assert torch.equal(left, away < 1.75 * cell)
