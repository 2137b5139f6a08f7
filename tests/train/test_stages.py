"""Stages 2 to 4 on a tiny map: what they train, what they leave alone, which losses reach the network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from posemap_fast.apr import APRConfig, PoseFrame, build_aprnet
from posemap_fast.fields import PoseDecoder
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
)

OFF = LossWeights(pose=0.0, image=0.0, posemap=0.0, rvs=0.0, rvs_posemap=0.0)


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
    assert float(sum(p.grad.abs().sum() for p in net.head.parameters())) > 0
    assert all(p.grad is None for p in online.nerfp.parameters())


def test_replayed_views_are_used_once_there_are_enough(parts) -> None:
    stage = apr_stage(parts, LossWeights())
    drawn = [stage._draw_views(k, torch.Generator().manual_seed(k)).poses.shape[0] for k in range(3)]
    assert drawn == [2, 4, 4]


def test_stage_continues_from_its_state_like_an_uninterrupted_one(parts) -> None:
    import copy

    online, views, net = parts
    twin = copy.deepcopy(net)
    whole = apr_stage(parts, LossWeights())
    for k in range(4):
        whole.step(k)
    first = apr_stage((online, views, twin), LossWeights())
    first.step(0)
    first.step(1)
    state = copy.deepcopy(first.state_dict())
    fresh = build_aprnet(net.config, net.pose_frame, seed=9)
    second = apr_stage((online, views, fresh), LossWeights())
    second.load_state_dict(state)
    second.step(2)
    second.step(3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


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
