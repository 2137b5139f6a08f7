"""Random views: ranges, box, free space."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import ConfigError
from posemap_fast.geometry import rotation_angle_deg
from posemap_fast.train import RVSConfig, ViewSampler


def sampler(tiny_map, poses: torch.Tensor, **changes: float) -> ViewSampler:
    occupancy = tiny_map[1].occupancy
    occupancy.bitfield.zero_()  # all free
    return ViewSampler(RVSConfig(**changes), poses, tiny_map[1])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_views_stay_within_the_ranges_of_their_source(tiny_map, poses) -> None:
    drawn, source = sampler(tiny_map, poses, max_translation=0.2, max_rotation_deg=10.0).draw(300, generator())
    shift = (drawn[:, :3, 3] - poses[source, :3, 3]).abs()
    assert 0.15 < float(shift.max()) <= 0.2 + 1e-6
    angle = rotation_angle_deg(drawn[:, :3, :3], poses[source, :3, :3])
    assert 8.0 < float(angle.max()) < 10.0 * 3**0.5 + 0.1


def test_positions_are_clamped_to_the_grown_box_of_the_training_cameras(tiny_map, poses) -> None:
    drawn, _ = sampler(tiny_map, poses, max_translation=1.0, box_margin=0.1).draw(200, generator())
    low, high = poses[:, :3, 3].amin(0) - 0.1, poses[:, :3, 3].amax(0) + 0.1
    assert bool(((drawn[:, :3, 3] >= low - 1e-6) & (drawn[:, :3, 3] <= high + 1e-6)).all())


def test_relative_range_follows_the_scale_of_the_scene(tiny_map, poses) -> None:
    small = sampler(tiny_map, poses, max_translation=0.0)
    far = poses.clone()
    far[:, :3, 3] *= 10
    assert sampler(tiny_map, far, max_translation=0.0).max_translation == pytest.approx(10 * small.max_translation)


def test_views_inside_matter_are_drawn_again(tiny_map, poses) -> None:
    views = sampler(tiny_map, poses, max_translation=0.5, clearance=0.01)
    occupancy = tiny_map[1].occupancy
    x0 = float(poses[:, 0, 3].mean())
    split = float(tiny_map[1].frame.to_field(torch.tensor([[x0, 0.0, 0.0]]))[0, 0])
    for _ in range(4):
        occupancy.update(0, lambda x: (x[:, 0] > split).float() * 1e3, generator())
    drawn, source = views.draw(200, generator())
    free = views.is_free(drawn[:, :3, 3])
    kept = (drawn == poses[source]).flatten(1).all(dim=1)
    assert bool((free | kept).all()) and int(free.sum()) > 50


def test_interpolated_views_lie_between_training_views(tiny_map, poses) -> None:
    views = sampler(tiny_map, poses, max_translation=1e-6, box_margin=1.0, max_rotation_deg=0.0, interpolate=1.0)
    drawn, source = views.draw(100, generator())
    away = (drawn[:, :3, 3] - poses[source, :3, 3]).norm(dim=1)
    longest = torch.cdist(poses[:, :3, 3], poses[:, :3, 3]).max()
    assert float(away.max()) > 0.3 * float(longest) and float(away.max()) <= float(longest) + 1e-5


def test_draws_repeat_for_the_same_generator(tiny_map, poses) -> None:
    views = sampler(tiny_map, poses)
    assert torch.equal(views.draw(20, generator())[0], views.draw(20, generator())[0])


def test_one_training_view_is_enough(tiny_map, poses) -> None:
    drawn, source = sampler(tiny_map, poses[:1], interpolate=0.5, max_translation=0.1).draw(5, generator())
    assert drawn.shape == (5, 4, 4) and source.tolist() == [0] * 5


def test_ranges_are_checked() -> None:
    with pytest.raises(ConfigError, match="interpolate"):
        RVSConfig(interpolate=1.5)
    with pytest.raises(ConfigError, match="coarseness"):
        RVSConfig(coarseness=0.5)
