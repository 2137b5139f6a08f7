"""The occupancy grid: geometry of its cells, updates, visibility."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import ConfigError
from posemap_fast.render import OccupancyConfig, OccupancyGrid


def grid(n_cascades: int = 1, resolution: int = 16, warmup: int = 100) -> OccupancyGrid:
    return OccupancyGrid(OccupancyConfig(resolution=resolution, warmup_steps=warmup), n_cascades, 1 / 64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("n_cascades", [1, 3])
def test_update_finds_exactly_the_dense_half(n_cascades: int) -> None:
    occupancy = grid(n_cascades)
    for _ in range(4):
        occupancy.update(0, lambda x: (x[:, 0] > 0.5).float() * 100, generator())
    points = torch.rand(2000, 3, generator=generator())
    clear = (points[:, 0] - 0.5).abs() > 2 / 16
    assert torch.equal(occupancy.is_occupied(points)[clear], (points[:, 0] > 0.5)[clear])


def test_cells_of_each_cascade_cover_its_cube() -> None:
    occupancy = grid(n_cascades=3)
    centres = occupancy.cell_centers(torch.arange(occupancy.occs.numel())).reshape(3, -1, 3)
    for level, side in enumerate((0.25, 0.5, 1.0)):
        low, high = centres[level].amin(), centres[level].amax()
        assert float(low) == pytest.approx(0.5 - side / 2 + side / 32)
        assert float(high) == pytest.approx(0.5 + side / 2 - side / 32)


def test_restricted_cells_stay_empty_whatever_the_density() -> None:
    occupancy = grid()
    occupancy.restrict(lambda x: x[:, 2] < 0.5)
    occupancy.update(0, lambda x: torch.full((x.shape[0],), 1e3), generator())
    points = torch.rand(500, 3, generator=generator())
    clear = (points[:, 2] - 0.5).abs() > 1 / 16
    assert torch.equal(occupancy.is_occupied(points)[clear], (points[:, 2] < 0.5)[clear])
    assert occupancy.occupied_fraction() == 1.0


def test_what_was_restricted_stays_so_when_more_is() -> None:
    occupancy = grid()
    occupancy.restrict(lambda x: x[:, 2] < 0.5)
    occupancy.restrict(lambda x: x[:, 1] < 0.5)
    points = torch.rand(500, 3, generator=generator())
    clear = ((points[:, 1:] - 0.5).abs() > 1 / 16).all(dim=1)
    assert torch.equal(occupancy.is_occupied(points)[clear], (points[:, 1:] < 0.5).all(dim=1)[clear])


def test_matter_that_vanished_is_forgotten() -> None:
    occupancy = grid(warmup=1)
    occupancy.update(0, lambda x: torch.full((x.shape[0],), 1e3), generator())
    for step in range(1, 400):
        occupancy.update(step, lambda x: torch.full((x.shape[0],), 1e-6), torch.Generator().manual_seed(step))
    assert float(occupancy.occs.max()) < 0.01


def test_points_outside_and_nan_are_not_occupied() -> None:
    points = torch.tensor([[1.5, 0.5, 0.5], [-0.1, 0.5, 0.5], [float("nan"), 0.5, 0.5], [0.5, 0.5, 0.5]])
    assert grid().is_occupied(points).tolist() == [False, False, False, True]


def test_updates_depend_on_nothing_but_the_generator() -> None:
    first, second = grid(warmup=0), grid(warmup=0)
    for occupancy in (first, second):
        occupancy.update(5, lambda x: x.sum(dim=1), generator())
    assert torch.equal(first.bitfield, second.bitfield) and torch.equal(first.occs, second.occs)


@pytest.mark.parametrize("resolution", [0, 12])
def test_resolution_must_fill_whole_bytes(resolution: int) -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        OccupancyConfig(resolution=resolution)
