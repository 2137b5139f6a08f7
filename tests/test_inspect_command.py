"""`posemap inspect DATASET` from the command line, and the picture of a dataset from above."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.cli import main
from posemap_fast.data import Capture, Frame, ImageStack, Scene, load_room, write_transforms_json
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.eval.top_down import draw_top_down, floor_axes
from posemap_fast.geometry import Camera, Lens, SceneFrame, look_at

UP = torch.tensor([0.0, 0.0, 1.0]).double()


def store(room: Scene, folder: Path) -> Path:
    """The scene as a capture on disk."""
    frames = []
    for view, name in enumerate(room.names):
        path = folder / f"{name}.png"
        cv2.imwrite(str(path), room.images[view].numpy()[..., ::-1])
        frames.append(Frame(path.name, path, room.c2w[view], Lens(room.camera)))
    lists = {key: [frames[view].name for view in room.views(key)] for key in ("train", "val", "test")}
    capture = Capture("room", folder, frames, True, lists)
    write_transforms_json(folder, capture, {frame.name: frame.name for frame in frames})
    return folder


@pytest.fixture(scope="module")
def stored_room(tmp_path_factory) -> Path:
    room = load_room(n_train=24, n_val=4, n_test=4, n_unlabelled=0, width=96, height=72)
    return store(room, tmp_path_factory.mktemp("stored"))


def inspected(capsys, *words: str) -> dict:
    assert main(["inspect", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_sound_capture_has_no_problem_and_says_so(stored_room, capsys, tmp_path):
    picture = tmp_path / "room.png"
    found = inspected(capsys, str(stored_room), "--picture", str(picture))
    assert found["kind"] == "dataset" and found["problems"] == [] and found["dark_frame"] is None
    assert found["pose_check"]["verdict"] == "poses and calibration fit the images"
    assert found["stored"]["sizes"] == {"96x72": 32} and found["unit"] == "m"
    assert "triangulated" in found["frame"] and found["images"]["n_checked"] == 32
    image = cv2.imread(str(picture))
    assert image.shape[1] == 1200 and len(np.unique(image.reshape(-1, 3), axis=0)) > 50


def test_a_dark_frame_is_reported_with_its_widths(tmp_path, capsys):
    room = load_room(n_train=12, n_val=2, n_test=2, n_unlabelled=0, width=96, height=72)
    images = torch.stack([room.images[view] for view in range(room.n_views)])
    images[:, :2], images[:, :, -1:] = 0, 0
    found = inspected(capsys, str(store(replace(room, images=ImageStack.of(images)), tmp_path)), "--fast")
    dark = found["dark_frame"]
    assert dark["top"] in (2, 3) and dark["right"] in (1, 2) and (dark["bottom"], dark["left"]) == (0, 0)
    assert (dark["image_width"], dark["image_height"]) == (96, 72)
    assert any("dark frame" in problem for problem in found["problems"])


def test_poses_in_the_wrong_axes_are_reported_with_the_right_ones(stored_room, tmp_path, capsys):
    content = json.loads((stored_room / "transforms.json").read_text())
    for frame in content["frames"]:
        matrix = np.array(frame["transform_matrix"]) @ np.diag([1.0, -1, -1, 1])  # OpenCV poses in an OpenGL file
        frame["transform_matrix"] = matrix.tolist()
        (tmp_path / frame["file_path"]).write_bytes((stored_room / frame["file_path"]).read_bytes())
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    (tmp_path / "split.json").write_text((stored_room / "split.json").read_text())
    found = inspected(capsys, str(tmp_path), "--fast")
    assert "OpenGL and OpenCV exchanged" in found["problems"][0] and found["pose_check"]["fits"] is False


def test_a_picture_is_of_a_dataset_and_of_a_known_kind(stored_room, tmp_path, capsys):
    assert main(["inspect", str(stored_room), "--picture", str(tmp_path / "a.bmp")]) == 2
    assert "must end in .png, .svg, .pdf" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("{}")
    assert main(["inspect", str(tmp_path), "--picture", str(tmp_path / "a.png")]) == 2
    assert "draws a dataset" in capsys.readouterr().err
    assert main(["inspect", str(stored_room), "--fast", "--picture", str(tmp_path / "summary.json" / "a.png")]) == 2
    assert "cannot write the picture" in capsys.readouterr().err


def circle(n: int) -> torch.Tensor:
    angle = torch.arange(n).double() * 2 * torch.pi / n
    centre = torch.stack([3 * angle.cos(), 2 * angle.sin(), torch.zeros(n).double()], dim=1)
    return look_at(centre, torch.tensor([0.0, 0.0, -0.5]).double(), UP)


CAMERA = Camera(64, 48, 60.0, 60.0, 32.0, 24.0)


def test_convention_the_floor_is_seen_from_above_with_the_wider_side_to_the_right():
    floor = floor_axes(circle(12).numpy(), None)
    np.testing.assert_allclose(np.cross(*floor), UP, atol=1e-9)  # not mirrored, not from below
    np.testing.assert_allclose(np.abs(floor[0]), [1, 0, 0], atol=1e-9)
    box = torch.tensor([[0.4, 0.1, 0.3], [0.6, 0.9, 0.7]]).double()
    floor = floor_axes(circle(12).numpy(), SceneFrame(scale=0.1, offset=torch.full((3,), 0.5), aabb=box))
    np.testing.assert_allclose(np.abs(floor[0]), [0, 1, 0], atol=1e-9)
    np.testing.assert_allclose(np.cross(*floor), UP, atol=1e-9)


def test_the_same_dataset_gives_the_same_picture_in_each_format(tmp_path):
    splits = {"train": list(range(8)), "val": [8], "test": [9, 10], "unlabelled": [11]}
    points = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    frame = SceneFrame(scale=0.1, offset=torch.full((3,), 0.5))
    for suffix in ("png", "svg", "pdf"):
        paths = [tmp_path / f"{i}.{suffix}" for i in range(2)]
        for path in paths:
            draw_top_down(path, circle(12), [CAMERA] * 12, splits, points, frame, "m", "ring")
        assert paths[0].read_bytes() == paths[1].read_bytes()
    text = (tmp_path / "0.svg").read_text()
    for part in ("train (8)", "val (1)", "test (2)", "unlabelled (1)", "sparse points (500)", "2 m", "ring from above"):
        assert part in text


def test_degenerate_datasets_are_drawn_too(tmp_path):
    one = circle(12)[:1]
    draw_top_down(tmp_path / "one.svg", one, [CAMERA], {"train": [0]})
    same = one.expand(5, 4, 4)
    draw_top_down(tmp_path / "same.svg", same, [CAMERA] * 5, {"train": [0, 1, 2], "test": [3, 4]})
    far = circle(12)
    far[3, 0, 3] = 3.1e9
    draw_top_down(tmp_path / "far.svg", far, [CAMERA] * 12, {"train": list(range(12))})
    assert "1 camera(s) far off are not shown" in (tmp_path / "far.svg").read_text()
    far[::2, 0, 3] = 1e300
    with pytest.raises(DatasetError, match="cannot draw camera centres"):
        draw_top_down(tmp_path / "far.svg", far, [CAMERA] * 12, {"train": list(range(12))})
    with pytest.raises(ConfigError, match="must end in"):
        draw_top_down(tmp_path / "one.gif", one, [CAMERA], {"train": [0]})
