"""Alignment by distillation: poses from pictures, what the network learns from them, and the guard."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from posemap_fast.apr import APRConfig, APRNet, PoseFrame, build_aprnet
from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera, make_c2w, move_poses, rotation_angle_deg, so3_exp
from posemap_fast.render import (
    ImagePoseConfig,
    OccupancyConfig,
    RenderConfig,
    Renderer,
    image_pose,
    picture_differences,
    refine_poses,
    render_posemaps,
    render_views,
    search_poses,
)
from posemap_fast.render.picture_alignment import AlignedPoses
from posemap_fast.train import (
    AlignConfig,
    DistilAlignStage,
    OnlineMap,
    RVSConfig,
    TrainingViews,
    ViewSampler,
    distil_align,
)
from posemap_fast.train.selection import GuardedState, network_input


class Features(NamedTuple):
    x: torch.Tensor

    def select(self, indices: torch.Tensor) -> Features:
        return Features(self.x[indices])


class PaintedRoom:
    """A cube with opaque walls whose colour, and PoseMap, are smooth functions of the place, lit as the code says."""

    def __init__(self) -> None:
        self.field = self

    def grid_parameters(self) -> list[torch.nn.Parameter]:
        return []

    def appearance_code(self, histograms: torch.Tensor) -> None:
        return None

    def density(self, x: torch.Tensor) -> tuple[torch.Tensor, Features]:
        depth = (x - 0.5).abs().amax(dim=1) - 0.42  # behind the wall
        return 400 * torch.sigmoid(60 * depth), Features(x)

    def rgb(self, features: Features, *view: torch.Tensor | None) -> torch.Tensor:
        x = features.x
        waves = torch.stack([(25 * x).sin().prod(dim=1), (31 * x + 1).cos().prod(dim=1), (40 * x).sin().mean(dim=1)])
        _, appearance, rays = view
        return 0.5 + 0.5 * (waves.T if appearance is None else (waves.T + 3 * appearance[rays]).sin())

    def radiance(self, x: torch.Tensor, *view: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, Features]:
        sigmas, features = self.density(x)
        return sigmas, self.rgb(features, *view), features

    def pose_hidden(self, x: torch.Tensor, features: Features) -> torch.Tensor:
        return 4 * (x - 0.5)

    def project(self, hidden: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.fixture
def camera() -> Camera:
    return Camera(48, 36, 40.0, 40.0, 24.0, 18.0)


@pytest.fixture
def renderer(frame) -> Renderer:
    config = RenderConfig(steps_per_unit=64, occupancy=OccupancyConfig(resolution=16))
    return Renderer(config, frame, near=0.02)


@pytest.fixture
def truth() -> torch.Tensor:
    """Five poses near the middle of the room, looking different ways."""
    generator = torch.Generator().manual_seed(3)
    return make_c2w(so3_exp(torch.randn(5, 3, generator=generator)), 0.4 * torch.randn(5, 3, generator=generator))


@pytest.fixture
def images(renderer, camera, truth) -> torch.Tensor:
    """(5, 36, 48, 3) uint8 pictures of the room from there."""
    view = render_views(renderer, PaintedRoom(), truth, camera, with_posemap=False)
    return (view.rgb * 255).round().to(torch.uint8)


def errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    distance = (found[:, :3, 3] - truth[:, :3, 3]).norm(dim=1)
    return distance, rotation_angle_deg(found[:, :3, :3], truth[:, :3, :3])


def displaced(truth: torch.Tensor, metres: float = 0.1, degrees: float = 3.0) -> torch.Tensor:
    """Moved and turned so far, each another way."""
    generator = torch.Generator().manual_seed(5)
    turn, move = torch.randn(2, len(truth), 3, generator=generator)
    turn, move = (v / v.norm(dim=1, keepdim=True) for v in (turn, move))
    return move_poses(truth, math.radians(degrees) * turn, metres * move)


SHORT = ImagePoseConfig(steps=2, rows=12)
CONFIG = ImagePoseConfig(rows=36)


def test_poses_come_back_to_where_the_pictures_were_taken(renderer, camera, truth, images) -> None:
    start = displaced(truth)
    found = refine_poses(renderer, PaintedRoom(), camera, network_input(images), None, start, CONFIG)
    distance, angle = errors(found.c2w, truth)
    assert float(distance.max()) < 0.1 / 15 and float(angle.max()) < 3 / 15
    assert bool((found.difference < found.difference_before).all())


def test_exposure_does_not_count_and_images_do_not_influence_each_other(renderer, camera, truth, images) -> None:
    start, pictures = displaced(truth), network_input(images)
    together = refine_poses(renderer, PaintedRoom(), camera, pictures, None, start, CONFIG)
    dark = refine_poses(renderer, PaintedRoom(), camera, 0.6 * pictures[:1] + 0.1, None, start[:1], CONFIG)
    distance, angle = errors(dark.c2w, together.c2w[:1])
    assert float(distance) < 0.01 and float(angle) < 0.3


def test_a_search_finds_starts_that_lead_home_where_the_given_one_does_not(renderer, camera, truth, images) -> None:
    common = (renderer, PaintedRoom(), camera)
    pictures = network_input(images)
    far = displaced(truth, 0.35, 12.0)
    astray = refine_poses(*common, pictures, None, far, CONFIG)
    starts = search_poses(*common, pictures, None, far, CONFIG)
    found = refine_poses(*common, pictures, None, starts, CONFIG)
    is_home = [errors(poses.c2w, truth)[0] < 0.02 for poses in (astray, found)]
    assert int(is_home[1].sum()) >= int(is_home[0].sum()) + 2 and bool((is_home[1] >= is_home[0]).all())
    alone = search_poses(*common, pictures[2:3], None, far[2:3], CONFIG)
    torch.testing.assert_close(alone, starts[2:3], atol=1e-4, rtol=0)
    differences = [picture_differences(*common, pictures, None, poses, CONFIG) for poses in (far, found.c2w)]
    torch.testing.assert_close(differences[0], astray.difference_before)
    torch.testing.assert_close(differences[1], found.difference)


def test_a_search_looks_at_each_image_in_its_own_light(renderer, camera, truth) -> None:
    """Codes that change the colours beyond what exposure explains."""
    codes = torch.tensor([[0.0, 0.5, 1.0], [0.7, 0.0, 0.4], [1.0, 0.3, 0.0], [0.2, 0.9, 0.5], [0.6, 0.6, 0.1]])
    common = (renderer, PaintedRoom(), camera)
    pictures = render_views(*common[:2], truth, camera, appearance=codes, with_posemap=False).rgb.permute(0, 3, 1, 2)
    far = displaced(truth, 0.2, 6.0)
    own = search_poses(*common, pictures, codes, far, CONFIG)
    others = search_poses(*common, pictures, codes.roll(1, dims=0), far, CONFIG)
    assert float(errors(own, truth)[0].max()) < 0.5 * float(errors(others, truth)[0].max())
    assert float(errors(own, truth)[0].max()) < 0.1
    alone = search_poses(*common, pictures[2:3], codes[2:3], far[2:3], CONFIG)
    torch.testing.assert_close(alone, own[2:3], atol=1e-4, rtol=0)


def test_starts_of_a_search_move_where_most_of_the_picture_is_sky(renderer, camera, truth, monkeypatch) -> None:
    room, seen = PaintedRoom(), []
    below = room.density
    monkeypatch.setattr(room, "density", lambda x: (below(x)[0] * (x[:, 2] < 0.2), Features(x)))  # a floor alone

    def stay(size: Camera, picture: object, images: torch.Tensor, c2w: torch.Tensor, **_: object) -> AlignedPoses:
        seen.append(c2w)
        return AlignedPoses(c2w, torch.zeros(len(c2w)), torch.zeros(len(c2w), 2))

    monkeypatch.setattr(image_pose, "align_to_images", stay)
    search_poses(renderer, room, camera, torch.rand(5, 3, 36, 48), None, truth, CONFIG)
    moves = (seen[0].view(5, -1, 4, 4) - truth[:, None])[:, 1:, :3, 3].norm(dim=-1)
    assert float(moves.min()) > 1e-3 and float(moves.max()) < 10


def test_numbers_of_views_below_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="rvs_batch and replay_batch"):
        AlignConfig(replay_batch=-1)
    with pytest.raises(ConfigError, match="replay_batch needs"):
        AlignConfig(replay_batch=2)


@pytest.mark.parametrize("values", [{"steps": 0}, {"rows": 3}])
def test_bad_schedules_are_refused(values) -> None:
    with pytest.raises(ConfigError, match="image pose"):
        ImagePoseConfig(**values)


def network(truth: torch.Tensor, camera: Camera, pose_from: str = "head") -> APRNet:
    predicted = {"posemap_channels": 3, "posemap_cells": (2, 3)}  # of the painted room
    config = APRConfig(input_size=(32, 32), pose_from=pose_from, **predicted)
    return build_aprnet(config, PoseFrame.from_poses(truth, 1.0), truth[0], camera=camera)


def stage(renderer, camera, truth, images, pose_from="head", **changes) -> DistilAlignStage:
    views = TrainingViews.of(images, truth, camera)
    renderer.occupancy.restrict(lambda x: (x - 0.5).abs().amax(dim=1) > 0.3)  # the middle of the room is free
    sampler = ViewSampler(RVSConfig(max_translation=0.1), truth, renderer)
    cache = SimpleNamespace(posemaps=render_posemaps(renderer, PaintedRoom(), truth, camera))
    online = OnlineMap(PaintedRoom(), renderer, sampler, cache, 1.0)  # type: ignore[arg-type]
    options = {"steps": 6, "batch": 2, "lr": 1e-3, "validate_every": 2, "guard": 10.0, "image_pose": CONFIG}
    config = AlignConfig(**(options | changes))
    found = DistilAlignStage(config, network(truth, camera, pose_from), online, images, camera, views, 0, views)
    found.poses = displaced(truth)  # as a network that was trained would answer
    return found


def test_the_network_learns_poses_that_nobody_gave(renderer, camera, truth, images) -> None:
    found = stage(renderer, camera, truth, images)
    before = {name: value.clone() for name, value in found.net.state_dict().items()}
    start, _ = errors(found.poses, truth)
    for k in range(found.n_steps):
        found.step(k)
    end, _ = errors(found.poses, truth)
    assert float(end.median()) < 0.3 * float(start.median()) and len(found.trusted()) >= 4
    moved = {name for name, value in found.net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("head.output") for name in moved) and not any("running" in name for name in moved)
    assert found.best.state["step"] == found.n_steps


def test_a_network_that_predicts_posemaps_learns_those_at_the_poses_found(renderer, camera, truth, images) -> None:
    found = stage(renderer, camera, truth, images, "posemap", posemap_weight=10.0, image_pose=SHORT)
    before = {name: value.clone() for name, value in found.net.state_dict().items()}
    losses = [found.step(k).get("posemap", 0.0) for k in range(found.n_steps)]
    moved = {name for name, value in found.net.state_dict().items() if not torch.equal(value, before[name])}
    assert losses[-1] > 0
    for part in ("head.output", "refiner.posemap", "refiner.confidence", "backbone"):
        assert any(name.startswith(part) for name in moved), part
    assert not any("running" in name or name.startswith("refiner.readout") for name in moved)


def test_posemaps_are_those_at_all_true_poses_of_a_step(renderer, camera, truth, images, monkeypatch) -> None:
    """Those of new images are rendered, those of training and of kept views come from where they are kept."""
    changes = {"rvs_batch": 2, "replay_batch": 3, "posemap_weight": 1.0, "image_pose": SHORT}
    found = stage(renderer, camera, truth, images, "posemap", **changes)
    poses, wanted, rendered = [], [], []
    encode, render = PoseFrame.encode, distil_align.render_posemaps
    monkeypatch.setattr(PoseFrame, "encode", lambda self, c2w: poses.append(c2w) or encode(self, c2w))
    monkeypatch.setattr(distil_align, "render_posemaps", lambda *args: rendered.append(len(args[2])) or render(*args))
    distance = distil_align.posemap_distance

    def kept(net, maps, true, **more):
        wanted.append(true)
        return distance(net, maps, true, **more)

    monkeypatch.setattr(distil_align, "posemap_distance", kept)
    for k in range(found.n_steps):
        found.step(k)
    assert [len(true) for true in wanted[:4]] == [6, 6, 9, 9] and rendered == [2] * (2 * len(wanted))
    for c2w, true in zip(poses, wanted, strict=True):
        torch.testing.assert_close(true, render(renderer, PaintedRoom(), c2w, camera))


def test_views_around_the_poses_found_teach_too(renderer, camera, truth, images, monkeypatch) -> None:
    """Fresh ones in every step, those of earlier steps once there are enough; none around a pose that does not fit."""
    found = stage(renderer, camera, truth, images, rvs_batch=2, replay_batch=3, image_pose=SHORT)
    monkeypatch.setattr(found, "trusted", lambda: torch.tensor([1, 3]))
    counts = []
    found.net.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    for k in range(found.n_steps):
        found.step(k)
    assert [n for n in counts if n != len(images)][:4] == [6, 6, 9, 9]  # known and new two each, two fresh, three kept
    apart = (found.replay.poses[:12, None, :3, 3] - found.poses[None, :, :3, 3]).abs()
    assert float(apart[:, [1, 3]].amax(dim=2).amin(dim=1).max()) < 0.1 + 1e-6
    view = render_views(renderer, PaintedRoom(), found.replay.poses[:1], camera, image_size=(32, 32))
    torch.testing.assert_close(found.replay.images[0].float(), 255 * view.rgb[0], atol=1, rtol=0)


def test_random_views_are_near_the_poses_found_in_free_space_and_in_their_light(
    renderer, camera, truth, images, monkeypatch
) -> None:
    monkeypatch.setattr(PaintedRoom, "appearance_code", lambda self, histograms: torch.rand(len(histograms), 3))
    found = stage(renderer, camera, truth, images, rvs_batch=8, image_pose=SHORT)
    found.online.sampler.config = dataclasses.replace(found.online.sampler.config, interpolate=1.0)
    found.poses[:, :3, 3] = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0], [0, -0.5, 0], [0, 0, 0]])
    found.poses[1, :3, 3] = 0.45 * renderer.frame.length_to_world(1.0)  # in the wall
    seen = found._random_views(0, torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)).poses
    source = found.random_views
    assert source is not None and torch.equal(source.codes, found.codes[[0, 2]])
    apart = (seen[:, None, :3, 3] - found.poses[[0, 2], :3, 3]).abs().amax(dim=2)
    assert float(apart.amin(dim=1).max()) < 0.1 + 1e-6
    found.random_views = None
    assert found._random_views(1, torch.tensor([1]), torch.Generator()) is None


def test_images_that_the_map_does_not_come_to_resemble_teach_nothing(renderer, camera, truth, images) -> None:
    found = stage(renderer, camera, truth, images, min_gain=1.1)
    before = copy.deepcopy(found.net.state_dict())
    for k in range(found.n_steps):
        found.step(k)
    assert all(torch.equal(value, before[name]) for name, value in found.net.state_dict().items())


@pytest.mark.parametrize("views", [{}, {"rvs_batch": 1, "replay_batch": 2}])
def test_an_interrupted_alignment_ends_like_one_that_was_not(renderer, camera, truth, images, views) -> None:
    whole = stage(renderer, camera, truth, images, image_pose=SHORT, **views)
    for k in range(whole.n_steps):
        whole.step(k)
    for cut in (1, 4):  # in the first part, and in the second
        first, second = (stage(renderer, camera, truth, images, image_pose=SHORT, **views) for _ in range(2))
        for k in range(cut):
            first.step(k)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for k in range(cut, whole.n_steps):
            second.step(k)
        ours, theirs = second.best.state["net"], whole.best.state["net"]
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_guard_keeps_the_last_state_that_is_not_much_worse(truth, images, camera, monkeypatch) -> None:
    net, views = network(truth, camera), TrainingViews.of(images, truth, camera)
    scores = iter([1.0, 1.05, 0.9, 1.2])  # at the start, then at three looks
    monkeypatch.setattr("posemap_fast.train.selection.validation_score", lambda *_: {"val_score": next(scores)})
    state = GuardedState(net, views, every=1, n_steps=3, tolerance=0.1)
    steps = []
    for done in (1, 2, 3):
        state.look(done)
        steps.append(state.state["step"])
    assert steps == [1, 2, 2]


def test_large_images_are_shrunk_in_steps_that_a_gpu_has_room_for(monkeypatch) -> None:
    """torch's CUDA kernel of antialiased resizing refuses more than 94 times at once."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 1500), torch.linspace(0, 1, 2000), indexing="ij")
    images = torch.stack([rows, columns, rows * columns])[None]
    resized, sizes = image_pose._resized, [(1500, 2000)]
    monkeypatch.setattr(image_pose, "_resized", lambda x, *size: sizes.append(size) or resized(x, *size))
    small = image_pose._shrunk(images, Camera(16, 12, 10.0, 10.0, 8.0, 6.0))
    assert sizes == [(1500, 2000), (96, 128), (12, 16)]
    assert all(a / b <= 94 for before, after in itertools.pairwise(sizes) for a, b in zip(before, after, strict=True))
    torch.testing.assert_close(small, resized(images, 12, 16), atol=5e-3, rtol=0)
    image_pose._shrunk(small, Camera(8, 6, 5.0, 5.0, 4.0, 3.0))
    assert sizes[3:] == [(6, 8)]
