"""Stages 2 to 4 on a tiny map: what they train, what they leave alone, which losses reach the network."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from posemap_fast.apr import APRConfig, APROutput, AugmentConfig, PoseFrame, build_aprnet
from posemap_fast.errors import ConfigError
from posemap_fast.fields import PoseDecoder
from posemap_fast.geometry import rotation_angle_deg
from posemap_fast.train import (
    AlignConfig,
    AlignStage,
    APRStage,
    APRTrainConfig,
    LossWeights,
    OnlineMap,
    PoseBranchConfig,
    PoseBranchStage,
    RVSConfig,
    TrainingViews,
    ViewCache,
    ViewSampler,
    rendered_size,
    selection,
)

OFF = LossWeights(pose=0.0, image=0.0, posemap=0.0, rvs=0.0, rvs_posemap=0.0, sigma=0.0)


@pytest.fixture
def parts(tiny_map, camera, poses, tmp_path):
    """(online map, views, network) with three views of the tiny map."""
    from posemap_fast.progress import NoProgress

    nerfp, renderer = tiny_map
    images = torch.randint(0, 255, (3, 36, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = TrainingViews.of(images, poses, camera)
    sampler = ViewSampler(RVSConfig(max_translation=0.1), poses, renderer)
    nerfp.requires_grad_(False)
    cache = ViewCache.load_or_render(tmp_path / "views.pt", renderer, nerfp, views, (18, 24), NoProgress())
    online = OnlineMap(nerfp, renderer, sampler, cache, 1.0)
    net = build_aprnet(APRConfig(input_size=(32, 32)), PoseFrame.from_poses(poses, "auto"), poses[0])
    return online, views, net


@pytest.fixture
def posemap_parts(parts, poses, camera):
    """As `parts`, with a network that solves for the pose from the PoseMap it predicts."""
    online, views, _ = parts
    channels, rows, cols = online.cache.posemaps.shape[1:]
    predicted = {"posemap_channels": channels, "posemap_cells": (rows, cols), "posemap_width": 8}
    config = APRConfig(input_size=(32, 32), pose_from="posemap", **predicted)
    return online, views, build_aprnet(config, PoseFrame.from_poses(poses, "auto"), poses[0], camera=camera)


def apr_stage(parts, weights: LossWeights, **changes) -> APRStage:
    online, views, net = parts
    config = APRTrainConfig(steps=4, batch=3, rvs_batch=2, replay_batch=2, weights=weights, **changes)
    return APRStage(config, net, online, views, views, seed=0)


@pytest.mark.parametrize("loss", ["pose", "image", "posemap", "rvs"])
def test_each_loss_alone_moves_the_network(parts, loss: str) -> None:
    stage = apr_stage(parts, dataclasses.replace(OFF, **{loss: 1.0}), triplet_margin=100.0)
    before = {name: p.clone() for name, p in parts[2].backbone.named_parameters()}
    values = stage.step(0)
    assert loss in values and values["loss"] > 0
    moved = [name for name, p in parts[2].backbone.named_parameters() if not torch.equal(p, before[name])]
    assert moved


def test_posemap_loss_pulls_the_predicted_pose_through_the_map(parts) -> None:
    online, _, net = parts
    stage = apr_stage(parts, dataclasses.replace(OFF, posemap=1.0))
    net.zero_grad()
    losses = stage._losses(
        torch.tensor([0, 1, 2]), stage._draw_views(0, torch.Generator().manual_seed(0)), torch.Generator()
    )
    assert list(losses) == ["posemap"]
    losses["posemap"].backward()
    assert float(net.head.output.weight.grad.abs().sum()) > 0
    assert all(p.grad is None for p in net.head.spread.parameters())
    assert all(p.grad is None for p in online.nerfp.parameters())


@pytest.mark.parametrize("points", [0.0, 0.5])
def test_a_predicted_posemap_is_compared_with_the_true_one_for_every_image_of_the_step(
    posemap_parts, monkeypatch, points: float
) -> None:
    """Replayed views too, and the renders at the training poses: each needs only the map at a pose that is known."""
    online, _, net = posemap_parts
    stage = apr_stage(
        posemap_parts, dataclasses.replace(OFF, image=1e-9, posemap=2.0, rvs=1.0, rvs_posemap=3.0, points=points)
    )
    for k in range(2):
        drawn = stage._draw_views(k, torch.Generator().manual_seed(k))
    index = torch.tensor([2, 0, 1])
    seen: list[APROutput] = []
    run = net.forward
    monkeypatch.setattr(net, "forward", lambda *a, **b: seen.append(run(*a, **b)) or seen[-1])
    losses = stage._losses(index, drawn, torch.Generator())
    predicted = seen[0].posemap
    assert len(predicted) == 3 + 3 + 4
    known = torch.cat([online.cache.posemaps[index]] * 2)
    at_random = stage._posemaps(drawn.poses)
    for name, ours, true, weight in (
        ("posemap", predicted[:6], known, 2.0),
        ("rvs_posemap", predicted[6:], at_random, 3.0),
    ):
        readout = net.refiner.readout
        apart = (readout(ours) - readout(true)).norm(dim=-1).mean() / readout.point_scale[0]
        torch.testing.assert_close(losses[name], weight * ((ours - true).norm(dim=1).mean() + points * apart))
        assert apart > 0
    (losses["posemap"] + losses["rvs_posemap"]).backward()
    moved = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"refiner.posemap.weight", "backbone.reduce.0.0.weight"} <= moved
    assert not any(name.startswith(("head", "refiner.confidence", "refiner.spread")) for name in moved)
    assert all(p.grad is None for p in online.nerfp.parameters())


def test_a_network_that_solves_for_the_pose_continues_from_its_state(posemap_parts, tmp_path) -> None:
    check_continuation(posemap_parts, tmp_path, {})


def test_replayed_views_are_used_once_there_are_enough(parts) -> None:
    stage = apr_stage(parts, LossWeights())
    drawn = [stage._draw_views(k, torch.Generator().manual_seed(k)).poses.shape[0] for k in range(3)]
    assert drawn == [2, 4, 4]


@pytest.mark.parametrize(
    "changes",
    [{}, {"ema": 0.6, "select_from": 0.0, "validate_every": 1}, {"augment": AugmentConfig(gain=0.3, noise=0.1)}],
    ids=["plain", "average", "augmented"],
)
def test_stage_continues_from_its_state_like_an_uninterrupted_one(parts, tmp_path, changes) -> None:
    check_continuation(parts, tmp_path, changes)


def check_continuation(parts, tmp_path, changes) -> None:
    online, views, net = parts
    twin = copy.deepcopy(net)
    whole = apr_stage(parts, LossWeights(), **changes)
    for k in range(4):
        whole.step(k)
    first = apr_stage((online, views, twin), LossWeights(), **changes)
    first.step(0)
    first.step(1)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    fresh = build_aprnet(net.config, net.pose_frame, seed=9, camera=views.camera)
    second = apr_stage((online, views, fresh), LossWeights(), **changes)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    second.step(2)
    second.step(3)
    assert_same_state(net, fresh)
    assert whole.best.state["step"] == second.best.state["step"]
    for name, value in whole.best.state["net"].items():
        assert torch.equal(value, second.best.state["net"][name]), name
    if whole.average is not None:
        assert_same_state(whole.average, second.average)


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_the_average_of_the_weights_is_what_is_validated_and_chosen(parts, monkeypatch) -> None:
    net = parts[2]
    judged: list[torch.nn.Module] = []
    score = selection.validation_score
    monkeypatch.setattr(selection, "validation_score", lambda net, views: judged.append(net) or score(net, views))
    stage = apr_stage(parts, dataclasses.replace(OFF, pose=1.0), ema=0.75, select_from=1.0, validate_every=2)
    states = []
    for k in range(4):
        stage.step(k)
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    assert judged == [stage.average.module] * 2
    chosen = stage.best.state
    assert chosen["step"] == 4
    for name in ("head.output.weight", next(n for n in states[0] if n.endswith("running_mean"))):
        average = states[0][name]  # it begins with the first step's weights, not with the untrained ones
        for state in states[1:]:
            average = 0.75 * average + 0.25 * state[name]
        torch.testing.assert_close(chosen["net"][name], average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(chosen["net"][name], states[-1][name])
    assert net.training


def test_without_an_average_the_network_itself_is_chosen(parts) -> None:
    stage = apr_stage(parts, dataclasses.replace(OFF, pose=1.0), select_from=1.0)
    for k in range(4):
        stage.step(k)
    assert stage.average is None and stage.state_dict()["average"] is None
    for name, value in parts[2].state_dict().items():
        assert torch.equal(stage.best.state["net"][name], value), name


def passes(net: torch.nn.Module) -> list[tuple[torch.Tensor, APROutput]]:
    """Input of the backbone and output of the network, of every pass in training from now on."""
    seen: list[tuple[torch.Tensor, APROutput]] = []
    images: list[torch.Tensor] = []
    net.backbone.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].detach().clone()))
    net.register_forward_hook(lambda n, _, output: seen.append((images[-1], output)) if n.training else None)
    return seen


def test_a_pass_in_bfloat16_keeps_parameters_poses_and_losses_in_float32(parts) -> None:
    online, views, net = parts
    inside: list[torch.dtype] = []
    net.backbone.register_forward_hook(lambda _, __, output: inside.append(output.final.dtype))
    seen = passes(net)
    twin = copy.deepcopy(net)
    values = apr_stage(parts, LossWeights(), precision="bfloat16").step(0)
    assert inside[0] == torch.bfloat16
    output = seen[0][1]
    assert {t.dtype for t in (output.vector12, output.c2w, output.log_sigma)} == {torch.float32}
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in net.parameters())
    expected = apr_stage((online, views, twin), LossWeights()).step(0)
    assert set(values) == set(expected) >= {"pose", "image", "posemap", "rvs", "rvs_posemap", "sigma"}
    for name, value in values.items():
        assert value == pytest.approx(expected[name], rel=0.1, abs=0.05), name  # 8 bits of mantissa
        assert value != expected[name], name


def test_every_image_of_a_step_is_augmented_and_validation_is_not(parts) -> None:
    online, views, net = parts
    twin, plain = copy.deepcopy(net), passes(net)
    apr_stage(parts, LossWeights(), validate_every=1).step(0)
    changed = passes(twin)
    config = AugmentConfig(gain=0.5, erase=0.3)
    shown: list[torch.Tensor] = []
    twin.backbone.register_forward_pre_hook(lambda b, i: None if b.training else shown.append(i[0]))
    apr_stage((online, views, twin), LossWeights(), augment=config, validate_every=1).step(0)
    (before, _), (after, _) = plain[0], changed[0]
    assert before.shape == after.shape == (3 + 3 + 2, 3, 32, 32)  # real images, their renders, random views
    difference = (after - before).abs().flatten(1).amax(dim=1)
    assert bool((difference > 0.01).all())
    assert torch.equal(shown[0], twin.resized(selection.network_input(views.images[torch.arange(3)])))


def test_sigma_loss_alone_trains_nothing_but_the_spread(parts) -> None:
    net = parts[2]
    stage = apr_stage(parts, dataclasses.replace(OFF, sigma=1.0))
    before = {name: p.clone() for name, p in net.named_parameters()}
    values = [stage.step(k) for k in range(3)]
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {f"head.spread.{name}" for name, _ in net.head.spread.named_parameters()}
    assert values[0]["loss"] == values[0]["sigma"]


def test_poses_are_learnt_as_if_there_were_no_sigma_loss(parts) -> None:
    online, views, net = parts
    twin = copy.deepcopy(net)
    for changed, sigma in ((net, 100.0), (twin, 0.0)):  # so large that clipping them together would show
        stage = apr_stage((online, views, changed), LossWeights(sigma=sigma))
        assert ("sigma" in stage.step(0)) == (sigma > 0)
        stage.step(1)
    differing = [name for name, value in net.state_dict().items() if not torch.equal(value, twin.state_dict()[name])]
    assert differing == [f"head.spread.{name}" for name, _ in net.head.spread.named_parameters()]


@pytest.mark.parametrize("rvs", [1.0, 0.0])
def test_sigma_is_judged_by_the_errors_of_random_views_where_there_are_any(parts, rvs: float) -> None:
    _, views, net = parts
    seen = passes(net)
    stage = apr_stage(parts, LossWeights(rvs=rvs, sigma=0.5))
    drawn = stage._draw_views(0, torch.Generator())
    index = torch.tensor([2, 0, 1])
    losses = stage._losses(index, drawn, torch.Generator())
    output = seen[0][1]
    part, truth = (slice(6, 8), drawn.poses) if rvs else (slice(0, 3), views.c2w[index])
    distance = (output.c2w[part, :3, 3] - truth[:, :3, 3]).norm(dim=1) / net.pose_frame.scale
    angle = torch.deg2rad(rotation_angle_deg(output.c2w[part, :3, :3], truth[:, :3, :3]))
    errors, log_sigma = torch.stack([distance, angle], dim=1), output.log_sigma[part]
    torch.testing.assert_close(losses["sigma"], 0.5 * (errors / log_sigma.exp() + log_sigma).mean())
    assert net.pose_frame.scale != 1


def test_scale_zero_renders_views_at_the_size_of_the_network(parts, camera) -> None:
    assert rendered_size(camera, 0.5, (32, 40)) == (18, 24)
    assert rendered_size(camera, 0.01, (32, 40)) == (1, 1)
    assert rendered_size(camera, 0.0, (32, 40)) == (32, 40)
    stage = apr_stage(parts, LossWeights(), render_scale=0.0)
    assert stage._draw_views(0, torch.Generator()).images.shape == (2, 32, 32, 3)
    assert apr_stage(parts, LossWeights())._draw_views(0, torch.Generator()).images.shape == (2, 18, 24, 3)


@pytest.mark.parametrize(
    "wrong", [{"ema": 1.0}, {"ema": -0.1}, {"render_scale": -0.5}, {"render_scale": 1.5}, {"subset": 0.0}, {"steps": 0}]
)
def test_impossible_schedules_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        APRTrainConfig(**wrong)


def test_pose_branch_trains_nothing_else(parts, camera) -> None:
    online, _, net = parts
    nerfp, decoder = online.nerfp, PoseDecoder()
    before = {name: value.clone() for name, value in nerfp.state_dict().items()}
    config = PoseBranchConfig(steps=3, batch=4)
    stage = PoseBranchStage(config, nerfp, decoder, net.pose_frame, online.renderer, camera, online.sampler, 0)
    for k in range(3):
        stage.step(k)
    moved = {name for name, value in nerfp.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"field.pose_params", "projection.weight", "projection.bias"}


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_alignment_moves_the_pose_but_neither_norms_nor_map(parts, camera, batch: int) -> None:
    online, views, net = parts
    nothing = TrainingViews.of(views.images[:0], views.c2w[:0], camera)
    config = AlignConfig(steps=2, batch=batch, lr=1e-3, triplet_margin=100.0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    stage = AlignStage(config, net, online, views.images, camera, nothing, seed=0)
    for k in range(2):
        values = stage.step(k)
    assert values["loss"] > 0
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("head") for name in moved)
    assert not any("running" in name for name in moved)
    assert stage.best.state["step"] == 2


def test_alignment_that_makes_validation_worse_keeps_the_start(parts, camera) -> None:
    online, views, net = parts
    start = {name: value.clone() for name, value in net.state_dict().items()}
    config = AlignConfig(steps=2, batch=2, lr=10.0, validate_every=1)
    stage = AlignStage(config, net, online, views.images, camera, views, seed=0)
    for k in range(2):
        stage.step(k)
    assert stage.best.state["step"] == 0
    assert all(torch.equal(value, start[name]) for name, value in stage.best.state["net"].items())


def test_image_loss_needs_two_images() -> None:
    with pytest.raises(ConfigError, match="image needs batch >= 2"):
        APRTrainConfig(batch=1)
    APRTrainConfig(batch=1, weights=LossWeights(image=0))
