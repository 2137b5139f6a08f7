"""scene.map and localizer.pmnet: round trips, versions, and the images a localizer accepts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.apr import APRConfig, PoseFrame, build_aprnet
from posemap_fast.errors import ConfigError, DatasetError, FileFormatError
from posemap_fast.fields import FieldConfig
from posemap_fast.files import LOCALIZER_MAGIC, MAP_MAGIC, read_container, write_container
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.localize import PoseRegressor, SceneMap, read_image
from posemap_fast.render import OccupancyConfig, RenderConfig

TINY_FIELD = FieldConfig(n_levels=4, log2_hashmap_size=10, base_resolution=4, finest_resolution=16, hidden=16)
CAMERA = Camera(64, 48, 50.0, 50.0, 32.0, 24.0)
POSE_FRAME = PoseFrame((1.0, 2.0, 3.0), 0.5)


def scene_map() -> SceneMap:
    torch.manual_seed(0)
    render = RenderConfig(steps_per_unit=32, occupancy=OccupancyConfig(resolution=16))
    frame = SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))
    return SceneMap.untrained("tiny", TINY_FIELD, render, frame, 0.02, POSE_FRAME, CAMERA)


def regressor() -> PoseRegressor:
    config = APRConfig(input_size=(48, 64))
    return PoseRegressor(build_aprnet(config, POSE_FRAME), config, CAMERA, {"sigma": {"t_m": 0.1, "r_deg": 2.0}})


def test_map_comes_back_bit_by_bit(tmp_path: Path) -> None:
    original = scene_map()
    original.save(tmp_path / "a.map")
    loaded = SceneMap.load(tmp_path / "a.map")
    assert loaded.camera == original.camera and loaded.pose_frame == original.pose_frame
    assert loaded.nerfp.config == original.nerfp.config and loaded.renderer.near == original.renderer.near
    for ours, theirs in zip(loaded._tensors().items(), original._tensors().items(), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1], theirs[1])


def test_map_with_an_unknown_backbone_is_refused(tmp_path: Path) -> None:
    scene_map().save(tmp_path / "a.map")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        SceneMap.load(tmp_path / "a.map", "referense")


def test_localizer_comes_back_and_answers_the_same(tmp_path: Path) -> None:
    original = regressor()
    original.save(tmp_path / "a.pmnet", "tiny")
    loaded = PoseRegressor.load(tmp_path / "a.pmnet")
    image = torch.randint(0, 255, (48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    answer = loaded.localize(image)
    assert torch.equal(answer.c2w, original.localize(image).c2w)
    assert (answer.sigma_t_m, answer.sigma_r_deg) == (0.1, 2.0) and answer.ms > 0


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
    image = read_image(tmp_path / "a.png", CAMERA)
    assert image.shape == (48, 64, 3) and image[0, 0].tolist() == [0, 0, 255]  # RGB


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
