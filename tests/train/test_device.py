"""Every stage keeps its tensors on the device of the map: checked on a pretended one, and on a GPU if there is one."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from posemap_fast.apr import APRConfig, PoseFrame, PoseMapReadout, build_aprnet
from posemap_fast.fields import NeRFP, PoseDecoder
from posemap_fast.progress import NoProgress
from posemap_fast.render import ImagePoseConfig
from posemap_fast.train import (
    AlignConfig,
    AlignStage,
    APRStage,
    APRTrainConfig,
    DistilAlignStage,
    FieldStage,
    FieldTrainConfig,
    LossWeights,
    OnlineMap,
    PoseBranchConfig,
    PoseBranchStage,
    RVSConfig,
    TrainingViews,
    ViewCache,
    ViewSampler,
    prune_occupancy,
)

from .pretend_device import DEVICE, MixedDevices, pretended_device


@pytest.fixture
def views(poses, camera, device: torch.device) -> TrainingViews:
    images = torch.randint(0, 255, (3, 36, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TrainingViews.of(images, poses, camera).to(device)


@pytest.fixture
def moved_map(tiny_map, device: torch.device):
    nerfp, renderer = tiny_map
    renderer.occupancy.to(device)
    return nerfp.to(device), renderer


def test_a_forgotten_tensor_is_found() -> None:
    with pretended_device():
        there = torch.ones(3, device=DEVICE)
        assert float((there + 1).sum()) == 6
        with pytest.raises(MixedDevices, match=r"shape \(3,\) is on the CPU"):
            there + torch.ones(3)


def test_stages_1_and_2(moved_map, views, camera, poses, device: torch.device) -> None:
    nerfp, renderer = moved_map
    renderer.occupancy.restrict(lambda x: x[:, 0] > 0.1)
    stage = FieldStage(FieldTrainConfig(steps=20, samples_per_step=512), nerfp, renderer, views, seed=0)
    for k in (0, 16, 17):
        assert stage.step(k)["loss"] > 0
    stage.load_state_dict(stage.state_dict())
    assert prune_occupancy(nerfp, renderer, views, seed=0) >= 0
    sampler = ViewSampler(RVSConfig(max_translation=0.1, interpolate=0.5), views.c2w, renderer)
    decoder = PoseDecoder().to(device)
    frame = PoseFrame.from_poses(poses, "auto")
    branch = PoseBranchStage(PoseBranchConfig(steps=2, batch=2), nerfp, decoder, frame, renderer, camera, sampler, 0)
    assert branch.step(0)["loss"] > 0


def test_stage_1_with_a_transient_branch(tiny_map, views, device: torch.device) -> None:
    nerfp, renderer = tiny_map
    nerfp = NeRFP(dataclasses.replace(nerfp.config, transient_dim=4), nerfp.frame).to(device)
    renderer.occupancy.to(device)
    stage = FieldStage(FieldTrainConfig(steps=20, samples_per_step=512), nerfp, renderer, views, seed=0)
    for k in (0, 16):
        assert math.isfinite(stage.step(k)["loss"])
    stage.load_state_dict(stage.state_dict())


@pytest.mark.parametrize("pose_from", ["head", "posemap"])
def test_stages_3_and_4(
    moved_map, views, camera, poses, device: torch.device, tmp_path, monkeypatch, pose_from: str
) -> None:
    nerfp, renderer = moved_map
    nerfp.requires_grad_(False)
    monkeypatch.setattr(torch, "save", lambda *_: None)  # a pretended tensor has no storage to write
    cache = ViewCache.load_or_render(tmp_path / "views.pt", renderer, nerfp, views, (18, 24), NoProgress())
    sampler = ViewSampler(RVSConfig(max_translation=0.1), views.c2w, renderer)
    online = OnlineMap(nerfp, renderer, sampler, cache, 1.0)
    frame = PoseFrame.from_poses(poses, "auto")
    rows, cols = cache.posemaps.shape[2:]
    config = APRConfig(input_size=(32, 32), pose_from=pose_from, posemap_cells=(rows, cols))
    net = build_aprnet(config, frame, poses[0], camera=camera).to(device)
    if net.refiner is not None:
        readout = PoseMapReadout.fit(cache.posemaps, frame.encode_points(cache.points), cache.opacity + 1, seed=0)
        net.refiner.readout.load_state_dict(readout.state_dict())
    config = APRTrainConfig(steps=3, batch=3, rvs_batch=2, replay_batch=2, weights=LossWeights())
    stage = APRStage(config, net, online, views, views, seed=0)
    for k in range(3):
        assert stage.step(k)["loss"] > 0
    align = AlignStage(AlignConfig(steps=1, batch=2), net, online, views.images, camera, views, seed=0)
    assert align.step(0)["loss"] >= 0
    monkeypatch.setattr(ViewSampler, "is_free", lambda self, x: torch.isfinite(x).all(dim=1))  # all is full in this map
    schedule = {"image_pose": ImagePoseConfig(steps=1, rows=8), "min_gain": -math.inf}
    config = AlignConfig(steps=2, batch=2, rvs_batch=2, replay_batch=2, **schedule)
    distil = DistilAlignStage(config, net, online, views.images, camera, views, 0, views)
    for k in range(distil.n_steps):
        assert math.isfinite(distil.step(k)["loss"])
    assert len(distil.replay) == 4  # of two steps
