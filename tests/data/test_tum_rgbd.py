"""TUM RGB-D sequences: axes, matching by time, calibrations, and one line for each kind of bad input."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import load_scene, parse_capture, parse_tum_rgbd, read_tum_poses
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, look_at, project_points, quaternion_from_matrix

TARGET = torch.tensor([0.5, 0.2, 1.0], dtype=torch.float64)
START = 1305031102.0
N_FRAMES = 24


def camera_pose(index: int) -> torch.Tensor:
    centre = torch.tensor([2.0, 0.1 * index - 1, 1.3], dtype=torch.float64)
    return look_at(centre, TARGET, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


def truth_line(time: float, c2w: torch.Tensor) -> str:
    w, x, y, z = quaternion_from_matrix(c2w[:3, :3]).tolist()
    return f"{time:.4f} {' '.join(f'{v:.10f}' for v in [*c2w[:3, 3].tolist(), x, y, z, w])}\n"


@pytest.fixture
def sequence(tmp_path: Path) -> Path:
    """24 images of 64x48 at 10 Hz, poses 7 ms later and at the middle between images."""
    folder = tmp_path / "rgbd_dataset_freiburg3_office"
    (folder / "rgb").mkdir(parents=True)
    images, truth = "# color images\n# timestamp filename\n", "# ground truth trajectory\n"
    for index in range(N_FRAMES):
        time = START + 0.1 * index
        name = f"rgb/{time:.6f}.png"
        cv2.imwrite(str(folder / name), np.full((48, 64, 3), 5 * index, np.uint8))
        images += f"{time:.6f} {name}\n"
        truth += truth_line(time + 0.007, camera_pose(index)) + truth_line(time + 0.05, camera_pose(0))
    (folder / "rgb.txt").write_text(images)
    (folder / "groundtruth.txt").write_text(truth)
    return folder


def test_convention_ground_truth_is_camera_to_world_with_the_scalar_last(tmp_path):
    half = math.sqrt(0.5)  # a quarter turn about z: c2w turns the camera's x into the world's y
    (tmp_path / "groundtruth.txt").write_text(f"2.5 1 2 3 0 0 {half} {half}\n1.5 0 0 0 0 0 0 1\n")
    times, c2w = read_tum_poses(tmp_path / "groundtruth.txt")
    assert times.tolist() == [1.5, 2.5] and c2w[1, :3, 3].tolist() == [1, 2, 3]
    assert torch.allclose(c2w[1, :3, 0], torch.tensor([0, 1.0, 0]).double())  # world-to-camera would give -y
    assert torch.equal(c2w[0], torch.eye(4).double())  # with the scalar first it is a half turn


def test_images_take_the_pose_nearest_in_time(sequence):
    capture = parse_capture(sequence)
    assert len(capture.frames) == N_FRAMES and capture.is_metric and not capture.skipped
    for index, frame in enumerate(capture.frames):
        assert frame.name == f"rgb/{START + 0.1 * index:.6f}.png"
        assert torch.allclose(frame.c2w, camera_pose(index), atol=1e-8)
        _, depth = project_points(frame.lens.camera, frame.c2w[None], TARGET[None])
        assert depth > 0


def test_images_without_a_pose_in_time_are_skipped_and_counted(sequence):
    lines = (sequence / "groundtruth.txt").read_text().splitlines(keepends=True)
    (sequence / "groundtruth.txt").write_text("".join(reversed(lines[:9])))  # four images; order does not matter
    capture = parse_tum_rgbd(sequence)
    assert len(capture.frames) == 4 and torch.allclose(capture.frames[3].c2w, camera_pose(3), atol=1e-8)
    assert capture.skipped == {"no pose within 0.02 s in groundtruth.txt": 20}


def test_calibration_of_the_data_set_goes_by_the_name_of_the_folder(sequence):
    camera = parse_tum_rgbd(sequence).frames[0].lens.camera
    assert camera == Camera(640, 480, 535.4, 539.2, 320.6, 248.1).resized(64, 48)  # +0.5: from the image's corner
    first = sequence.rename(sequence.with_name("rgbd_dataset_freiburg1_desk"))
    lens = parse_tum_rgbd(first).frames[0].lens
    assert lens.model == "opencv" and lens.coefficients == (0.2624, -0.9531, -0.0054, 0.0026, 1.1633)
    assert lens.camera.fx == pytest.approx(51.73) and lens.camera.cx == pytest.approx(31.91)
    second = first.rename(first.with_name("freiburg2_xyz"))
    assert parse_tum_rgbd(second).frames[0].lens.coefficients[0] == 0.2312
    third = second.rename(second.with_name("mine"))
    with pytest.raises(DatasetError, match=r"no calibration.txt, .* add calibration.txt with 'fx fy cx cy'"):
        parse_tum_rgbd(third)


@pytest.mark.parametrize(
    ("text", "model", "coefficients"),
    [
        ("50 51 31.5 23.5\n", "pinhole", ()),
        ("# fx fy cx cy\n50 51 31.5 23.5 0 0 0 0\n", "pinhole", ()),
        ("50 51\n31.5 23.5\n.1 .2 .01 .02\n", "opencv", (0.1, 0.2, 0.01, 0.02)),
    ],
)
def test_calibration_file_goes_first_and_is_for_the_stored_images(sequence, text, model, coefficients):
    (sequence / "calibration.txt").write_text(text)
    lens = parse_tum_rgbd(sequence).frames[0].lens
    assert lens.camera == Camera(64, 48, 50.0, 51.0, 32.0, 24.0)
    assert (lens.model, lens.coefficients) == (model, coefficients)


def test_sequence_is_recognised_split_and_decoded(sequence):
    scene = load_scene(sequence)
    assert scene.n_views == N_FRAMES and scene.counts()["test"] > 0 and scene.is_metric
    assert "blocks" in scene.split_rule


def rgb_line(line: str):
    def damage(folder: Path) -> None:
        lines = (folder / "rgb.txt").read_text().splitlines()
        lines[2] = line
        (folder / "rgb.txt").write_text("\n".join(lines))

    return damage


def truth(text: str):
    return lambda folder: (folder / "groundtruth.txt").write_text(text)


def calibration(text: str):
    return lambda folder: (folder / "calibration.txt").write_text(text)


BAD = [
    (lambda s: (s / "rgb.txt").write_text("# nothing\n"), r"rgb.txt: names no image; restore it"),
    (rgb_line(f"{START} a b"), r"rgb.txt: line 3: must be 'timestamp filename'; got 3 columns"),
    (rgb_line("soon rgb/a.png"), r"rgb.txt: line 3: 'soon' is not a number"),
    (rgb_line(f"{START} rgb/a.png"), r"rgb.txt: line 3: .*rgb/a.png does not exist; restore"),
    (rgb_line(f"{START} ../a.png"), r"rgb.txt: line 3: '../a.png' leads out of"),
    (rgb_line(f"{START} ./rgb/{START + 0.1:.6f}.png"), r"rgb.txt: line 4: '.*' is listed twice; remove"),
    (lambda s: (s / "groundtruth.txt").unlink(), r"groundtruth.txt: does not exist"),
    (truth("# nothing\n"), r"groundtruth.txt: holds no pose"),
    (truth("1 0 0 0 0 0 1\n"), r"line 1: must have the 8 columns 'timestamp tx .* qw'; got 7"),
    (truth("1 0 0 0 0 0 0 0\n"), r"line 1: quaternion has norm 0"),
    (truth("1 0 0 nan 0 0 0 1\n"), r"line 1: has NaN, infinite or absurd values"),
    (truth("inf 0 0 0 0 0 0 1\n"), r"line 1: the time must be finite; got inf"),
    (truth("noon 0 0 0 0 0 0 1\n"), r"line 1: 'noon' is not a number"),
    (calibration("1 2 3\n"), r"calibration.txt: must hold 'fx fy cx cy'.* got 3 numbers"),
    (calibration("50 50 32 inf\n"), r"calibration.txt: must hold .* all finite"),
    (calibration("-50 50 32 24\n"), r"calibration.txt: focal length must lie in .* got -50"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_line_with_file_line_value_and_mend(sequence, damage, message):
    damage(sequence)
    with pytest.raises(DatasetError, match=message) as caught:
        parse_tum_rgbd(sequence)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)
