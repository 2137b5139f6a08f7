"""Cambridge Landmarks: axes, the lens of a VisualSFM model, absurd cameras, both layouts, and bad input."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import load_scene, parse_cambridge, parse_capture, read_cambridge_poses
from posemap_fast.data.nvm import NvmCamera, measurement_lens, read_nvm_cameras
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, look_at, project_points, quaternion_from_matrix

TARGET = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
HEADER = "Visual Landmark Dataset V1\nImageFile, Camera Position [X Y Z W P Q R]\n\n"
FOCALS = {"seq1": 1600.0, "seq2": 1700.0}


def camera_pose(index: int) -> torch.Tensor:
    """A camera that looks at TARGET."""
    centre = torch.tensor([10.0 + index, 5.0 - 2 * index, 1.5], dtype=torch.float64)
    return look_at(centre, TARGET, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


def line_of(name: str, c2w: torch.Tensor, norm: float = 1.0) -> str:
    quaternion = quaternion_from_matrix(c2w[:3, :3].T) * norm
    return f"{name} {' '.join(f'{v:.10g}' for v in [*c2w[:3, 3].tolist(), *quaternion.tolist()])}\n"


def nvm_line(name: str, focal: float, radial: float = 0.0) -> str:
    return f"{name}\t{focal} 1 0 0 0 9 9 9 {radial} 0\n"  # a pose that would be noticed if it were used


def write_image(path: Path, size: tuple[int, int] = (64, 36)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((size[1], size[0], 3), 90, np.uint8))


NAMES = {
    "train": [f"seq1/frame{i:05d}.png" for i in range(1, 6)],
    "test": [f"seq2/frame{i:05d}.png" for i in range(6, 9)],
}


def index_of(name: str) -> int:
    return int(name[-9:-4])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Five training and three test images of 64x36 in the official layout, with a VisualSFM model."""
    folder = tmp_path / "ShopFacade"
    folder.mkdir()
    for part, names in NAMES.items():
        lines = [line_of(name, camera_pose(index_of(name)), 1.045) for name in names]
        (folder / f"dataset_{part}.txt").write_text(HEADER + "".join(lines))
        for name in names:
            write_image(folder / name)
    cameras = [nvm_line(name.replace("png", "jpg"), FOCALS[name[:4]]) for part in NAMES.values() for name in part]
    (folder / "reconstruction.nvm").write_text(f"NVM_V3 \n\n{len(cameras)}\n{''.join(cameras)}\n7\n1 2 3 points\n")
    return folder


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_convention_position_is_the_centre_and_the_quaternion_is_world_to_camera_scalar_first(tmp_path):
    half = math.sqrt(0.5)  # a quarter turn about z: w2c turns the world's x into the camera's y
    (tmp_path / "list.txt").write_text(f"{HEADER}seq1/a.png 1 2 3 {half} 0 0 {half}\n")
    ((name, c2w),) = read_cambridge_poses(tmp_path / "list.txt")
    assert name == "seq1/a.png" and c2w[:3, 3].tolist() == [1, 2, 3]
    assert torch.allclose(c2w[:3, 1], torch.tensor([1.0, 0, 0]).double())  # the camera's y lies along world x
    assert not torch.allclose(c2w[:3, 0], torch.tensor([0, 1.0, 0]).double())  # camera-to-world, or the scalar last


def test_cameras_see_what_they_look_at_and_norms_do_not_matter(scene):
    capture = parse_cambridge(scene)
    assert len(capture.frames) == 8 and capture.is_metric and capture.name == "ShopFacade" and not capture.skipped
    for frame in capture.frames:
        assert torch.allclose(frame.c2w, camera_pose(index_of(frame.name)), atol=1e-8)
        pixel, depth = project_points(frame.lens.camera, frame.c2w[None], TARGET[None])
        assert torch.allclose(pixel[0, 0], torch.tensor([32.0, 18.0]).double(), atol=1e-6) and depth > 0


def test_split_is_the_official_one(scene):
    capture = parse_capture(scene)
    assert capture.lists == {"rule": "official lists (dataset_train.txt, dataset_test.txt)", **NAMES}
    loaded = load_scene(scene)
    assert loaded.counts() == {"train": 5, "val": 0, "test": 3, "unlabelled": 0}
    assert loaded.split_rule.startswith("official lists")


@pytest.mark.parametrize(
    ("size", "fx", "fy"),
    [((1920, 1080), 1600.0, 1600.0), ((852, 480), 710.0, 1600 / 1080 * 480), ((480, 480), 400.0, 400.0)],
)
def test_focal_lengths_of_the_model_are_those_of_images_1920_wide(scene, size, fx, fy):
    for names in NAMES.values():
        for name in names:
            write_image(scene / name, size)
    first, last = parse_cambridge(scene).frames[0].lens.camera, parse_cambridge(scene).frames[-1].lens.camera
    assert (first.width, first.height, first.cx, first.cy) == (*size, size[0] / 2, size[1] / 2)
    assert (first.fx, first.fy) == pytest.approx((fx, fy))
    assert last.fx == pytest.approx(fx * 1700 / 1600)


def test_without_a_model_the_focal_length_is_1670_and_that_is_said(scene, caplog):
    (scene / "reconstruction.nvm").unlink()
    capture = parse_cambridge(scene)
    assert {frame.lens.camera.fx for frame in capture.frames} == {1670.0 * 64 / 1920}
    assert "has no camera for 8 of 8 images; f = 1670.0 px at 1920 px width is assumed" in caplog.text


def test_images_that_the_model_lacks_get_its_median_focal_length(scene, caplog):
    replace(scene / "reconstruction.nvm", "seq2/frame00007.jpg", "seq2/frame99999.jpg")
    assert parse_cambridge(scene).frames[6].lens.camera.fx == pytest.approx(1600 / 30)
    assert "has no camera for 1 of 8 images; f = 1600.0 px" in caplog.text


def test_cameras_absurdly_far_away_are_skipped_and_counted(scene):
    path = scene / "dataset_train.txt"
    far = camera_pose(1)
    far[0, 3] = 3.1e9
    path.write_text(HEADER + line_of(NAMES["train"][0], far) + path.read_text().split("\n", 4)[4])
    capture = parse_cambridge(scene)
    assert [frame.name for frame in capture.frames] == NAMES["train"][1:] + NAMES["test"]
    assert sum(capture.skipped.values()) == 1 and "1000 times" in next(iter(capture.skipped))
    assert capture.lists is not None and capture.lists["train"] == NAMES["train"][1:]


@pytest.mark.parametrize(("bent", "tolerance"), [(-0.1, 0.13), (-0.05, 0.01), (0.001, 1e-6), (0.05, 0.01), (0.1, 0.06)])
def test_lens_inverts_the_distortion_that_visualsfm_measures(bent, tolerance):
    camera = Camera(1920, 1080, 1670.0, 1670.0, 960.0, 540.0)
    radial = bent / (960**2 + 540**2) * 1670**2
    lens = measurement_lens(camera, radial)
    assert lens is not None
    v, u = np.mgrid[0:1081:60, 0:1921:60]
    stored = np.stack([u.ravel(), v.ravel()], axis=1)
    measured = (stored - [960, 540]) / 1670  # VisualSFM: undistorted = measured (1 + r |measured|^2)
    undistorted = measured * (1 + radial * (measured**2).sum(axis=1, keepdims=True))
    assert np.abs(lens.pixels(undistorted) - stored).max() < tolerance
    assert np.abs(undistorted * 1670 - (stored - [960, 540])).max() > 0.9 * abs(bent) * 960  # not a trifle
    half = measurement_lens(camera.resized(960, 540), radial)
    assert half is not None and half.coefficients == pytest.approx(lens.coefficients)


def test_distorted_images_get_a_lens_and_impossible_ones_are_skipped(scene):
    for number, radial in ((3, -0.05), (4, -9.0)):
        name = f"seq1/frame{number:05d}.jpg"
        replace(scene / "reconstruction.nvm", nvm_line(name, 1600.0), nvm_line(name, 1600.0, radial))
    capture = parse_cambridge(scene)
    assert capture.skipped == {"its radial distortion in reconstruction.nvm is absurd": 1}
    lens = capture.frames[2].lens
    assert lens.model == "opencv" and lens.coefficients[0] == pytest.approx(0.05, rel=0.01)  # k1 is about -r
    assert sum(frame.lens.is_pinhole for frame in capture.frames) == 6
    assert load_scene(scene).n_views == 7


def test_windows_and_unix_names_of_the_model_are_found(scene):
    replace(scene / "reconstruction.nvm", "seq1/frame00001.jpg", "seq1\\frame00001.jpg")
    assert read_nvm_cameras(scene / "reconstruction.nvm")["seq1/frame00001"] == NvmCamera(1600.0, 0.0)


def truncate_nvm(scene: Path) -> None:
    path = scene / "reconstruction.nvm"
    path.write_text(path.read_text().partition("seq2")[0])


def nvm_text(text: str):
    return lambda scene: (scene / "reconstruction.nvm").write_text(text)


BAD = [
    (lambda s: (s / "dataset_test.txt").unlink(), r"dataset_test.txt: does not exist"),
    (lambda s: (s / "dataset_test.txt").write_text(HEADER), r"dataset_test.txt: holds no pose"),
    (lambda s: replace(s / "dataset_train.txt", "seq1/frame00002.png ", ""), r"line 5: must have the 8 columns"),
    (lambda s: replace(s / "dataset_train.txt", " 1.5 ", " nan "), r"line 4: has NaN, infinite or absurd values"),
    (lambda s: replace(s / "dataset_train.txt", " 1.5 ", " left "), r"line 4: 'left' is not a number"),
    (
        lambda s: replace(s / "dataset_train.txt", "frame00002", "frame00001"),
        r"line 5: '.*' was given before, in line 4",
    ),
    (lambda s: replace(s / "dataset_test.txt", "seq2/frame00006", "seq1/frame00001"), r"is also in dataset_train.txt"),
    (lambda s: replace(s / "dataset_test.txt", "seq2/frame00006", "../x"), r"'../x.png' leads out of"),
    (lambda s: (s / "seq2/frame00007.png").unlink(), r"frame00007.png does not exist; restore"),
    (lambda s: replace(s / "dataset_test.txt", "frame00006", "f" * 300), r"cannot be a file name"),
    (nvm_text(""), r"reconstruction.nvm: must start with NVM_V3; got ''"),
    (nvm_text("NVM_V3\nmany\n"), r"line 2: must be the number of cameras; got 'many'"),
    (nvm_text("NVM_V3\n999999999\na 1 2\n"), r"line 3: must be 'name f qw qx qy qz x y z r 0'; got 'a 1 2'"),
    (nvm_text(f"NVM_V3\n1\n{nvm_line('a', -3.0)}"), r"line 3: focal length must lie in .* got -3"),
    (nvm_text(f"NVM_V3\n1\n{nvm_line('a', 9.0, math.nan)}"), r"line 3: radial distortion must be finite; got nan"),
    (nvm_text("NVM_V3\n1\n" + "a" * 9999), r"line 3: longer than 4096 bytes"),
    (truncate_nvm, r"reconstruction.nvm: ends after 5 of 8 cameras; copy"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_line_with_file_line_value_and_mend(scene, damage, message):
    damage(scene)
    with pytest.raises(DatasetError, match=message) as caught:
        parse_cambridge(scene)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


def write_converted(folder: Path, calibration: str = "744.5\n") -> None:
    """Two training and two test images as DSAC* leaves them."""
    for part, numbers in (("train", (1, 2)), ("test", (3, 4))):
        for kind in ("poses", "calibration"):
            (folder / part / kind).mkdir(parents=True)
        for number in numbers:
            key = f"seq{number}_frame{number:05d}"
            write_image(folder / part / "rgb" / f"{key}.png", (852, 480))
            np.savetxt(folder / part / "poses" / f"{key}.txt", camera_pose(number).numpy())
            (folder / part / "calibration" / f"{key}.txt").write_text(calibration)


def test_converted_layout_has_camera_to_world_matrices_and_focal_lengths_of_the_stored_size(tmp_path):
    write_converted(tmp_path)
    capture = parse_capture(tmp_path)
    assert [frame.name for frame in capture.frames][::3] == [
        "test/rgb/seq3_frame00003.png",
        "train/rgb/seq2_frame00002.png",
    ]
    assert torch.allclose(capture.frames[0].c2w, camera_pose(3), atol=1e-12)
    assert {frame.lens.camera for frame in capture.frames} == {Camera(852, 480, 744.5, 744.5, 426.0, 240.0)}
    assert capture.lists is not None and len(capture.lists["train"]) == len(capture.lists["test"]) == 2


def test_converted_layout_may_have_the_whole_camera_matrix(tmp_path):
    write_converted(tmp_path, "744 0 420\n0 745 241\n0 0 1\n")
    assert parse_cambridge(tmp_path).frames[0].lens.camera == Camera(852, 480, 744.0, 745.0, 420.0, 241.0)


CONVERTED_BAD = [
    ("train/poses", None, r"has no seq1_frame00001.txt in poses; restore it"),
    ("train/calibration", None, r"has no seq1_frame00001.txt in calibration; restore it"),
    ("train/calibration", "1 2\n", r"must hold a focal length, or K as 3x3 numbers; got 2"),
    ("train/calibration", "0\n", r"focal length must lie in .* got 0"),
    ("train/calibration", "9 0 nan 0 9 0 0 0 1\n", r"principal point must lie in the image"),
    ("train/poses", "1 2\n", r"must hold 4 rows of 4 numbers; got 2"),
]


@pytest.mark.parametrize(("folder", "text", "message"), CONVERTED_BAD)
def test_damaged_converted_layouts_are_refused(tmp_path, folder, text, message):
    write_converted(tmp_path)
    path = tmp_path / folder / "seq1_frame00001.txt"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        parse_cambridge(tmp_path)


def test_converted_poses_that_are_none_are_skipped_and_counted(tmp_path):
    write_converted(tmp_path)
    (tmp_path / "train/poses/seq1_frame00001.txt").write_text("inf " * 16)
    assert list(parse_cambridge(tmp_path).skipped.values()) == [1]


COUNTS = {
    "KingsCollege": (1220, 343),
    "OldHospital": (895, 182),
    "ShopFacade": (231, 103),
    "StMarysChurch": (1487, 530),
    "GreatCourt": (1532, 760),
}


@pytest.mark.dataset
@pytest.mark.parametrize("name", COUNTS)
def test_official_lists_have_the_published_numbers_of_frames(real_scenes, name):
    folder = real_scenes / "poses" / "cambridge" / name
    parts = [read_cambridge_poses(folder / f"dataset_{part}.txt") for part in ("train", "test")]
    assert tuple(map(len, parts)) == COUNTS[name]
    names = {pose.name for part in parts for pose in part}
    assert len(names) == sum(COUNTS[name])
    if name == "ShopFacade":
        assert {"seq2/frame00036.png", "seq2/frame00043.png"} <= names  # DFNet drops them
    stacked = torch.stack([pose.c2w for part in parts for pose in part])
    up = -stacked[:, :3, 1].mean(0)
    assert float(up.norm()) > 0.9  # photographs are taken upright; wrongly read quaternions would scatter this


@pytest.mark.dataset
def test_one_camera_of_great_court_is_absurd(real_scenes, tmp_path):
    source = real_scenes / "poses" / "cambridge" / "GreatCourt"
    write_image(tmp_path / "one.png", (16, 9))
    picture = (tmp_path / "one.png").read_bytes()
    for part in ("train", "test"):
        (tmp_path / f"dataset_{part}.txt").write_bytes((source / f"dataset_{part}.txt").read_bytes())
        for name, _ in read_cambridge_poses(source / f"dataset_{part}.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(picture)
    capture = parse_cambridge(tmp_path)
    assert list(capture.skipped.values()) == [1] and capture.lists is not None
    assert (len(capture.lists["train"]), len(capture.lists["test"])) == (1531, 760)
    assert "seq5/frame00297.png" not in {frame.name for frame in capture.frames}
    centres = torch.stack([frame.c2w[:3, 3] for frame in capture.frames])
    assert float(centres.abs().max()) < 1000
