"""The ring of earlier views, and the occupancy grid after stage 1."""

from __future__ import annotations

import dataclasses
import math

import torch

from posemap_fast.geometry import Camera
from posemap_fast.train import TrainingViews, prune_occupancy
from posemap_fast.train.replay import ViewReplay


def views(n: int, value: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((n, 4, 5, 3), value, dtype=torch.uint8), torch.eye(4).repeat(n, 1, 1) * value


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_ring_keeps_the_newest_views() -> None:
    ring = ViewReplay(4, (4, 5))
    for value in (1, 2, 3):
        ring.add(*views(2, value))
    assert len(ring) == 4
    assert sorted(ring.images[:, 0, 0, 0].tolist()) == [2, 2, 3, 3]


def test_images_and_poses_stay_together() -> None:
    ring = ViewReplay(6, (4, 5))
    for value in (1, 2, 3):
        ring.add(*views(2, value))
    slots = ring.draw(5, generator())
    assert len(slots) == 5
    assert torch.equal(ring.images[slots, 0, 0, 0].float(), ring.poses[slots, 0, 0])


def test_ring_that_holds_too_few_gives_none() -> None:
    ring = ViewReplay(6, (4, 5))
    ring.add(*views(2, 1))
    assert len(ring.draw(3, generator())) == 0
    assert len(ViewReplay(0, (4, 5)).draw(1, generator())) == 0


def test_posemaps_are_those_of_the_views_in_the_ring_and_rendered_once() -> None:
    """Also after older views gave up their slots, and after the ring was restored without PoseMaps."""
    rendered = []

    def render(poses: torch.Tensor) -> torch.Tensor:
        rendered.extend(poses[:, 0, 0].tolist())
        return poses[:, :1, :1].reshape(-1, 1, 1, 1).expand(-1, 7, 2, 3)

    def shown(ring: ViewReplay) -> list[float]:
        return ring.posemaps(torch.tensor([3, 0, 0, 2]), render)[:, 6, 1, 2].tolist()

    ring = ViewReplay(4, (4, 5))
    for value, is_known in ((1, True), (2, False), (3, True)):
        images, poses = views(2, value)
        ring.add(images, poses, render(poses) if is_known else None)
    rendered.clear()
    assert shown(ring) == shown(ring) == [2, 3, 3, 2] and rendered == [2, 2]
    rendered.clear()
    ring.add(*views(1, 4))  # slot 2
    assert shown(ring) == [2, 3, 3, 4] and rendered == [4]
    other = ViewReplay(4, (4, 5))
    other.load_state_dict(ring.state_dict())
    ring.load_state_dict(ring.state_dict())
    rendered.clear()
    assert shown(other) == shown(ring) == [2, 3, 3, 4] and sorted(rendered) == [2, 2, 3, 3, 4, 4]


def test_restored_ring_goes_on_like_the_original() -> None:
    first, second = ViewReplay(4, (4, 5)), ViewReplay(4, (4, 5))
    for value in (1, 2, 3):
        first.add(*views(2, value))
    second.load_state_dict(first.state_dict())
    for ring in (first, second):
        ring.add(*views(1, 9))
    assert torch.equal(first.images, second.images) and torch.equal(first.poses, second.poses)


def test_a_ring_that_is_hardly_filled_is_stored_small() -> None:
    ring = ViewReplay(1000, (4, 5))
    ring.add(*views(2, 1))
    assert ring.state_dict()["images"].untyped_storage().nbytes() == 2 * 4 * 5 * 3  # what torch.save writes


def test_prune_keeps_what_cameras_see_and_drops_what_lies_behind(tiny_map, poses) -> None:
    nerfp, renderer = tiny_map
    with torch.no_grad():  # opaque everywhere: cameras see only what is next to them
        nerfp.field.table.zero_()
        nerfp.field.radiance_spec = dataclasses.replace(nerfp.field.radiance_spec, bias=math.log(1e5))
    camera = Camera(48, 36, 40.0, 40.0, 24.0, 18.0)
    images = torch.zeros(len(poses), 36, 48, 3, dtype=torch.uint8)
    kept = prune_occupancy(nerfp, renderer, TrainingViews.of(images, poses, camera), seed=0)
    assert 0 < kept < 0.3
    seen = poses[:, :3, 3] + 0.1 * poses[:, :3, 2]
    behind = poses[:, :3, 3] + 1.5 * poses[:, :3, 2]
    assert bool(renderer.occupancy.is_occupied(renderer.frame.to_field(seen)).all())
    assert not bool(renderer.occupancy.is_occupied(renderer.frame.to_field(behind)).any())
    before = renderer.occupancy.bitfield.clone()
    prune_occupancy(nerfp, renderer, TrainingViews.of(images, poses, camera), seed=0)
    assert torch.equal(before, renderer.occupancy.bitfield)
