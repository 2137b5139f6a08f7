"""scene.map and localizer.pmnet: round trips, versions, and the images a localizer accepts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.apr import APRConfig, PoseFrame, WinogradConv2d, build_aprnet
from posemap_fast.errors import ConfigError, DatasetError, FileFormatError
from posemap_fast.eval import Calibration, calibrate
from posemap_fast.fields import FieldConfig
from posemap_fast.files import LOCALIZER_MAGIC, MAP_MAGIC, read_container, write_container
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.localize import ErrorModel, PoseRegressor, SceneMap, read_image
from posemap_fast.render import OccupancyConfig, RenderConfig, render_posemaps

TINY_FIELD = FieldConfig(n_levels=4, log2_hashmap_size=10, base_resolution=4, finest_resolution=16, hidden=16)
CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
POSE_FRAME = PoseFrame((1.0, 2.0, 3.0), 0.5)


def scene_map(**field: Any) -> SceneMap:
    torch.manual_seed(0)
    render = RenderConfig(steps_per_unit=32, occupancy=OccupancyConfig(resolution=16))
    frame = SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))
    return SceneMap.untrained("tiny", dataclasses.replace(TINY_FIELD, **field), render, frame, 0.02, POSE_FRAME, CAMERA)


CALIBRATION = {"t": {"0.5": 1.5, "0.68": 2.0, "0.9": 4.0}, "r": {"0.5": 0.2, "0.68": 0.5, "0.9": 0.9}, "n_views": 20}


def error_model() -> ErrorModel:
    """Of one training pose, 2 units to the right of the frame's centre, and unlike weights for both kinds of error."""
    support = torch.eye(4)[None].clone()
    support[0, :3, 3] = torch.tensor([3.0, 2.0, 3.0])
    weights = torch.tensor([[0.1, 0.5, 0.0, 1.0], [0.0, 0.0, 0.3, 2.0]], dtype=torch.float64)
    return ErrorModel(support, weights, POSE_FRAME.scale)


def regressor(metrics: dict[str, Any] | None = None, errors: ErrorModel | None = None, **network: Any) -> PoseRegressor:
    config = APRConfig(input_size=(48, 64), **network)
    net = build_aprnet(config, POSE_FRAME, camera=CAMERA)
    with torch.no_grad():
        net.head.spread[2].weight.normal_(generator=torch.Generator().manual_seed(1))
    return PoseRegressor(net, config, CAMERA, {"calibration": CALIBRATION} if metrics is None else metrics, errors)


def image(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("branch", ["position", "features", "nerf"])
def test_map_comes_back_bit_by_bit(branch: str, tmp_path: Path) -> None:
    original = scene_map(pose_branch=branch)
    original.save(tmp_path / "a.map")
    assert SceneMap.load(tmp_path / "a.map").usual_difference is None
    original.usual_difference = 0.01
    original.save(tmp_path / "a.map")
    loaded = SceneMap.load(tmp_path / "a.map")
    assert loaded.usual_difference == 0.01
    assert loaded.camera == original.camera and loaded.pose_frame == original.pose_frame
    assert loaded.nerfp.config == original.nerfp.config and loaded.renderer.near == original.renderer.near
    for ours, theirs in zip(loaded._tensors().items(), original._tensors().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])
    c2w = torch.eye(4)[None]
    maps = [render_posemaps(m.renderer, m.nerfp, c2w, CAMERA) for m in (original, loaded)]
    assert torch.equal(*maps) and maps[0].shape[1] == original.nerfp.config.posemap_channels
    assert loaded.decoder(maps[1]).shape == (1, 12)


def test_map_with_an_unknown_backbone_is_refused(tmp_path: Path) -> None:
    scene_map().save(tmp_path / "a.map")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        SceneMap.load(tmp_path / "a.map", "referense")


@pytest.mark.parametrize("errors", [error_model(), None], ids=["model", "none"])
@pytest.mark.parametrize("network", [{}, {"pose_from": "posemap", "posemap_cells": (3, 4)}], ids=["head", "posemap"])
def test_localizer_comes_back_and_answers_the_same(tmp_path: Path, network, errors: ErrorModel | None) -> None:
    original = regressor(errors=errors, **network)
    original.save(tmp_path / "a.pmnet", "tiny")
    loaded = PoseRegressor.load(tmp_path / "a.pmnet")
    answer, before = loaded.localize(image()), original.localize(image())
    assert torch.equal(answer.c2w, before.c2w)
    assert (answer.sigma_t_m, answer.sigma_r_deg) == (before.sigma_t_m, before.sigma_r_deg) and answer.ms > 0
    assert (answer.sigma_t_m is None) == (errors is None)


def test_sigma_is_the_error_models_for_this_image_times_the_factor_of_the_68_percent_level() -> None:
    found = regressor(errors=error_model())
    with torch.no_grad():
        output = found.net(image().permute(2, 0, 1)[None] / 255)
    t, r = found.errors.sigma(output.c2w, output.head_c2w, output.log_sigma)[0].tolist()
    answer = found.localize(image())
    assert (answer.sigma_t_m, answer.sigma_r_deg) == pytest.approx((2.0 * t, 0.5 * r), rel=1e-3)
    other = found.localize(image(1))
    assert other.sigma_t_m != answer.sigma_t_m and other.sigma_r_deg != answer.sigma_r_deg


@pytest.mark.parametrize(
    ("metrics", "errors"),
    [
        ({}, error_model()),
        ({"calibration": CALIBRATION}, None),
        ({"calibration": Calibration({}, {}, 0).to_dict()}, error_model()),
    ],
    ids=["no calibration", "no model", "calibrated on no view"],
)
def test_without_a_model_or_a_calibration_there_is_no_sigma(metrics, errors) -> None:
    answer = regressor(metrics, errors).localize(image())
    assert answer.sigma_t_m is None and answer.sigma_r_deg is None
    assert answer.to_dict("a")["sigma_t_m"] is None


def test_the_level_of_sigma_is_one_that_calibration_gives() -> None:
    calibration = calibrate(torch.rand(30), torch.rand(30), torch.rand(30, 2) + 0.1)
    metrics = {"calibration": json.loads(json.dumps(calibration.to_dict()))}
    assert regressor(metrics, error_model()).localize(image()).sigma_t_m is not None


@pytest.mark.parametrize(
    ("magic", "load", "kind"),
    [(MAP_MAGIC, SceneMap.load, "scene map"), (LOCALIZER_MAGIC, PoseRegressor.load, "localizer")],
)
def test_file_of_another_version_is_refused(magic: bytes, load, kind: str, tmp_path: Path) -> None:
    scene_map().save(tmp_path / "file") if magic == MAP_MAGIC else regressor().save(tmp_path / "file", "tiny")
    header, tensors = read_container(tmp_path / "file", magic)
    write_container(tmp_path / "file", magic, header | {"version": 99}, tensors)
    with pytest.raises(FileFormatError, match=f"{kind} of version 99"):
        load(tmp_path / "file")


def test_image_of_another_size_is_resized_to_the_camera(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.full((96, 128, 3), (255, 0, 0), dtype=np.uint8))
    pixels = read_image(tmp_path / "a.png", CAMERA)
    assert pixels.shape == (48, 64, 3) and pixels[0, 0].tolist() == [0, 0, 255]  # RGB


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such image"),
        (lambda path: path.write_bytes(b"text"), "not an image that can be decoded"),
        (lambda path: cv2.imwrite(str(path), np.zeros((48, 48, 3), np.uint8)), "the aspect ratio differs"),
    ],
    ids=["missing", "text", "square"],
)
def test_bad_query_is_named(make, message: str, tmp_path: Path) -> None:
    make(tmp_path / "query.png")
    with pytest.raises(DatasetError, match=message):
        read_image(tmp_path / "query.png", CAMERA)


def test_answers_on_a_cpu_are_the_networks_and_leave_its_file_as_it_was(tmp_path: Path) -> None:
    found = regressor(backbone="resnet18")
    found.net.config = found.config = dataclasses.replace(found.config, input_size=(192, 256))  # enough tiles
    large = torch.randint(0, 255, (192, 256, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found.save(tmp_path / "before.pmnet", "tiny")
    with torch.no_grad():
        expected = found.net(large.permute(2, 0, 1)[None].float() / 255).c2w[0]
    assert not any(isinstance(module, WinogradConv2d) for module in found.net.modules())
    answer = found.localize(large)
    assert any(isinstance(module, WinogradConv2d) for module in found.net.modules())
    torch.testing.assert_close(answer.c2w.float(), expected, rtol=1e-4, atol=1e-4)
    found.save(tmp_path / "after.pmnet", "tiny")
    assert (tmp_path / "before.pmnet").read_bytes() == (tmp_path / "after.pmnet").read_bytes()
