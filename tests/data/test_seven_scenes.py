"""7-Scenes: two ground truths, the official split, lost frames, and one line for each kind of bad input."""

from __future__ import annotations

import csv
import gzip
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import (
    Frame,
    load_scene,
    parse_capture,
    parse_seven_scenes,
    parse_transforms_json,
    read_sfm_poses,
    write_transforms_json,
)
from posemap_fast.data.seven_scenes import find_sfm_poses, read_sequences
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import (
    Camera,
    invert_c2w,
    look_at,
    make_c2w,
    matrix_from_quaternion,
    project_points,
    quaternion_from_matrix,
    rotation_angle_deg,
)

N_FRAMES = 6  # of each sequence
TARGET = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)


def camera_pose(sequence: int, index: int) -> torch.Tensor:
    """A camera that looks at TARGET."""
    centre = torch.tensor([2.0 + 0.1 * index, sequence - 2.5, 0.5 * index - 1], dtype=torch.float64)
    return look_at(centre, TARGET, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


def sfm_line(name: str, c2w: torch.Tensor, focal: float) -> str:
    w2c = invert_c2w(c2w)
    values = [*quaternion_from_matrix(w2c[:3, :3]).tolist(), *w2c[:3, 3].tolist(), focal]
    return f"{name} {' '.join(f'{value:.12g}' for value in values)}\n"


def name_of(sequence: int, index: int) -> str:
    return f"seq-{sequence:02d}/frame-{index:06d}.color.png"


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """Sequences 1, 2 (train) and 3 (test) of a scene "chess" with pose.txt files, no SfM poses."""
    folder = tmp_path / "chess"
    for sequence in (1, 2, 3):
        (folder / f"seq-{sequence:02d}").mkdir(parents=True)
        for index in range(N_FRAMES):
            path = folder / name_of(sequence, index)
            cv2.imwrite(str(path), np.full((24, 32, 3), 40 * index, np.uint8))
            pose = path.with_name(path.name.replace("color.png", "pose.txt"))
            np.savetxt(pose, camera_pose(sequence, index).numpy())
    (folder / "TrainSplit.txt").write_text("sequence1 \nsequence2\n")
    (folder / "TestSplit.txt").write_text("seq-03\r\n")
    return folder


def write_sfm(folder: Path, pattern: str = "chess_{}.txt", shift: float = 0.25) -> None:
    """Pseudo ground truth whose world is moved by `shift` along x, a focal length per sequence."""
    folder.mkdir(exist_ok=True)
    for part, sequences in (("train", (1, 2)), ("test", (3,))):
        lines = []
        for sequence in sequences:
            for index in reversed(range(N_FRAMES)):  # the real files are in no order either
                c2w = camera_pose(sequence, index)
                c2w[0, 3] += shift
                lines.append(sfm_line(name_of(sequence, index), c2w, 520.0 + sequence))
        (folder / pattern.format(part)).write_text("".join(lines))


def pose_file(scene: Path, sequence: int, index: int) -> Path:
    return scene / name_of(sequence, index).replace("color.png", "pose.txt")


def test_convention_dslam_poses_are_camera_to_world_as_they_stand(scene):
    capture = parse_seven_scenes(scene)
    assert capture.ground_truth == "dslam" and capture.is_metric and capture.name == "chess"
    assert len(capture.frames) == 18 and capture.frames[7].name == name_of(2, 1)
    assert torch.allclose(capture.frames[7].c2w, camera_pose(2, 1), atol=1e-12)
    assert capture.frames[7].lens.camera == Camera(640, 480, 525.0, 525.0, 320.0, 240.0).resized(32, 24)
    for frame in capture.frames:
        pixel, depth = project_points(frame.lens.camera, frame.c2w[None], TARGET[None])
        assert torch.allclose(pixel[0, 0], torch.tensor([16.0, 12.0]).double()) and depth > 0


def test_convention_sfm_poses_are_world_to_camera_with_the_scalar_first(tmp_path):
    angle = np.sqrt(0.5)  # a quarter turn about z: w2c turns the world's x into the camera's y
    (tmp_path / "a.txt").write_text(f"seq-01/frame-000000.color.png {angle} 0 0 {angle} 1 2 3 525.5\n")
    (pose,) = read_sfm_poses(tmp_path / "a.txt")
    assert torch.allclose(pose.c2w[:3, 1], torch.tensor([1.0, 0, 0]).double())  # the camera's y lies along world x
    assert torch.allclose(pose.c2w[:3, 3], torch.tensor([-2.0, 1.0, -3.0]).double())  # -R^T t, neither t nor -R t
    assert pose.focal == 525.5 and pose.name == "seq-01/frame-000000.color.png"


def test_sfm_ground_truth_goes_first_where_its_files_are_and_has_a_focal_length_per_frame(scene):
    write_sfm(scene.parent)
    capture = parse_capture(scene)
    assert capture.ground_truth == "sfm"
    want = camera_pose(3, 4)
    want[0, 3] += 0.25
    assert torch.allclose(capture.frames[16].c2w, want, atol=1e-9)
    focals = sorted({frame.lens.camera.fx for frame in capture.frames})
    assert focals == pytest.approx([521 / 20, 522 / 20, 523 / 20])  # the images are 32 wide
    dslam = parse_capture(scene, gt="dslam")
    assert dslam.ground_truth == "dslam" and torch.allclose(dslam.frames[16].c2w, camera_pose(3, 4))


def test_scene_is_recognised_and_decoded(scene):
    loaded = load_scene(scene, max_side=16, gt="dslam", stride=2)
    assert loaded.ground_truth == "dslam" and loaded.images.shape == (9, 12, 16, 3)
    assert loaded.counts() == {"train": 6, "val": 0, "test": 3, "unlabelled": 0}


def test_official_split_is_by_sequence_and_stride_counts_in_each(scene):
    capture = parse_seven_scenes(scene, stride=4)
    assert capture.lists is not None
    assert capture.lists["train"] == [name_of(1, 0), name_of(1, 4), name_of(2, 0), name_of(2, 4)]
    assert capture.lists["test"] == [name_of(3, 0), name_of(3, 4)]
    assert capture.lists["rule"] == "official sequences; train seq-01, seq-02; test seq-03; every 4. frame of each"


def test_lists_that_share_a_sequence_are_no_split(scene, caplog):
    (scene / "TestSplit.txt").write_text("sequence2\nsequence3\n")
    capture = parse_seven_scenes(scene)
    assert capture.lists is None and len(capture.frames) == 18
    assert "both name seq-02; split by rule instead" in caplog.text


LOST = [
    "nan nan nan nan\n" * 4,
    "-inf -inf -inf -inf\n" * 4,
    "0 0 0 0\n" * 4,
    "-1.#IND -1.#IND -1.#IND -1.#IND\n" * 4,
    "1 0 0 0\n0 2 0 0\n0 0 1 0\n0 0 0 1\n",
    "1 0 0 0\n0 1 0 0\n0 0 -1 0\n0 0 0 1\n",
    "1e200 0 0 0\n1e200 1 0 0\n0 0 -1e200 0\n0 0 0 1\n",
]


@pytest.mark.parametrize("text", LOST)
def test_lost_poses_are_skipped_and_counted(scene, text):
    pose_file(scene, 2, 3).write_text(text)
    capture = parse_seven_scenes(scene)
    assert len(capture.frames) == 17 and name_of(2, 3) not in [frame.name for frame in capture.frames]
    assert capture.skipped == {"no valid pose (NaN, infinite or not rigid: tracking was lost)": 1}
    assert capture.lists is not None and len(capture.lists["train"]) == 11


def test_frames_without_an_sfm_pose_are_skipped_and_counted(scene):
    write_sfm(scene.parent)
    lines = (scene.parent / "chess_train.txt").read_text().splitlines(keepends=True)
    (scene.parent / "chess_train.txt").write_text("".join(lines[2:]))
    assert parse_seven_scenes(scene).skipped == {"no pose in the SfM ground truth": 2}
    (scene.parent / "chess_test.txt").unlink()
    with pytest.raises(
        DatasetError, match=r"no frame of the test sequences \(seq-03\) has a pose in chess_train.txt; "
    ):
        parse_seven_scenes(scene)


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("", "chess_{}.txt"),
        ("", "poses_sfm_pgt_{}.txt"),
        ("..", "chess_sfm_{}.txt"),
        ("../7scenes_sfm", "Chess_{}.txt"),
        ("../7scenes_sfm", "sfm_chess_{}.txt"),
    ],
)
def test_sfm_poses_are_found_in_the_places_of_the_documentation(scene, folder, pattern):
    write_sfm(scene / folder, pattern)
    assert [path.name for path in find_sfm_poses(scene)] == [pattern.format("train"), pattern.format("test")]


def test_sfm_poses_of_another_scene_are_not_taken(scene):
    write_sfm(scene.parent, "fire_sfm_{}.txt")
    assert find_sfm_poses(scene) == [] and parse_seven_scenes(scene).ground_truth == "dslam"
    with pytest.raises(DatasetError, match=r"no SfM pseudo ground truth found \(as chess_train.txt.*; name it with"):
        parse_seven_scenes(scene, gt="sfm")


def test_option_names_the_sfm_file_or_folder_anywhere_plain_or_gzipped(scene, tmp_path):
    elsewhere = tmp_path / "far" / "chess"
    elsewhere.parent.mkdir()
    write_sfm(elsewhere, "sfm_{}.txt")
    packed = elsewhere / "sfm_train.txt.gz"
    packed.write_bytes(gzip.compress((elsewhere / "sfm_train.txt").read_bytes()))
    (elsewhere / "sfm_train.txt").unlink()
    assert parse_seven_scenes(scene, sfm_poses=str(elsewhere)).ground_truth == "sfm"
    (scene / "TestSplit.txt").write_text("sequence1\nsequence2\n")
    assert len(parse_seven_scenes(scene, sfm_poses=str(packed)).frames) == 12
    with pytest.raises(DatasetError, match=r"nowhere: no file chess_train.txt"):
        parse_seven_scenes(scene, sfm_poses=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gt": "slam"}, "gt must be auto, sfm or dslam; got 'slam'"),
        ({"stride": 0}, "stride must be a whole number of at least 1; got 0"),
        ({"stride": 1.5}, "stride must be a whole number"),
        ({"gt": "dslam", "sfm_poses": "x"}, "sfm_poses is not used with gt=dslam"),
    ],
)
def test_impossible_options_are_refused(scene, options, message):
    with pytest.raises(ConfigError, match=message):
        parse_seven_scenes(scene, **options)


@pytest.mark.parametrize("text", ["sequence1\nsequence2\n", "seq-01\nseq-02\n", "# x\nSeq1\nseq-2\nsequence1\n"])
def test_spellings_of_a_sequence_are_the_same(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    assert read_sequences(tmp_path / "list.txt") == ["seq-01", "seq-02"]


def link_out(scene: Path) -> None:
    path = scene / name_of(1, 0)
    path.rename(scene.parent / "x.png")
    path.symlink_to(scene.parent / "x.png")


BAD = [
    (lambda s: (s / "TestSplit.txt").unlink(), r"TestSplit.txt: does not exist"),
    (lambda s: (s / "TestSplit.txt").write_text(""), r"TestSplit.txt: names no sequence"),
    (lambda s: (s / "TestSplit.txt").write_text("sequence3\n../x\n"), r"TestSplit.txt: line 2: '../x' is no sequence"),
    (lambda s: (s / "TestSplit.txt").write_text("sequence9\n"), r"seq-09: cannot list this folder: No such file"),
    (lambda s: (s / "TestSplit.txt").write_bytes(b"\xff\xfe"), r"TestSplit.txt: not a text file"),
    (lambda s: pose_file(s, 1, 0).unlink(), r"frame-000000.pose.txt does not exist; restore"),
    (
        lambda s: pose_file(s, 1, 0).write_text("1 2 3\n"),
        r"frame-000000.pose.txt: must hold 4 rows of 4 numbers; got 3",
    ),
    (lambda s: pose_file(s, 1, 0).write_text("1 0 x 0\n"), r"frame-000000.pose.txt: line 1: 'x' is not a number"),
    (lambda s: pose_file(s, 1, 0).write_bytes(b"1 " * (1 << 25)), r"holds more than 32 MiB"),
    (link_out, r"frame-000000.color.png' leads out of"),
    (lambda s: (s / name_of(1, 0)).write_bytes(b""), r"frame-000000.color.png: the file is empty"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_one_line_with_file_line_value_and_mend(scene, damage, message):
    damage(scene)
    with pytest.raises(DatasetError, match=message) as caught:
        parse_seven_scenes(scene)
    assert "\n" not in str(caught.value) and "; " in str(caught.value)


BAD_LINES = [
    ("a 1 0 0 0 0 0 525\n", r"line 1: must have the 9 columns 'name qw .* f'; got 8"),
    ("a 1 0 0 0 0 0 0 525\nb 0 0 0 0 0 0 0 525\n", r"line 2: quaternion has norm 0, expected 1"),
    ("a 1 0 0 0 0 0 nan 525\n", r"line 1: has NaN, infinite or absurd values"),
    ("a 1 0 0 0 0 0 0 -525\n", r"line 1: focal length must lie in .* got -525"),
    ("a 1 0 0 0 0 0 0 525\n\na 1 0 0 0 0 0 0 525\n", r"line 3: 'a' was given before, in line 1"),
    ("a 1 0 0 zero 0 0 0 525\n", r"line 1: 'zero' is not a number"),
    ("\n# nothing\n", r"holds no pose; expected lines 'name qw"),
]


@pytest.mark.parametrize(("text", "message"), BAD_LINES)
def test_damaged_sfm_files_are_refused(tmp_path, text, message):
    (tmp_path / "chess_train.txt").write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_sfm_poses(tmp_path / "chess_train.txt")


@pytest.mark.parametrize("cut", [4, 30])
def test_truncated_gzip_is_refused(tmp_path, cut):
    packed = gzip.compress(sfm_line("a", torch.eye(4).double(), 525.0).encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[:-cut])
    with pytest.raises(DatasetError, match=r"a.txt.gz: this gzip file is damaged"):
        read_sfm_poses(tmp_path / "a.txt.gz")


def round_trip(capture, folder: Path) -> tuple[list[Frame], list[Frame]]:
    """Frames before and after transforms.json; empty files stand for the images, whose size the file tells."""
    for frame in capture.frames:
        (folder / frame.name).parent.mkdir(parents=True, exist_ok=True)
        (folder / frame.name).touch()
    write_transforms_json(folder, capture, {frame.name: frame.name for frame in capture.frames})
    return capture.frames, parse_transforms_json(folder).frames


def assert_same(before: list[Frame], after: list[Frame]) -> None:
    assert [frame.name for frame in before] == [frame.name for frame in after]
    for a, b in zip(before, after, strict=True):
        assert (a.c2w - b.c2w).abs().max() < 1e-6
        assert torch.equal(a.lens.camera.K, b.lens.camera.K) and a.lens == b.lens


@pytest.mark.parametrize("gt", ["sfm", "dslam"])
def test_transforms_json_keeps_poses_and_cameras(scene, tmp_path, gt):
    write_sfm(scene.parent)
    capture = parse_seven_scenes(scene, gt=gt)
    assert_same(*round_trip(capture, tmp_path / "out"))
    again = parse_transforms_json(tmp_path / "out")
    assert again.is_metric and again.lists == capture.lists


def original_poses(path: Path) -> dict[str, torch.Tensor]:
    """Frame name -> c2w of poses_original_*.csv.gz: camera centre, camera-to-world quaternion (w, x, y, z)."""
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    values = torch.tensor([[float(row[k]) for k in "t1 t2 t3 q1 q2 q3 q4".split()] for row in rows]).double()
    c2w = make_c2w(matrix_from_quaternion(values[:, 3:]), values[:, :3])
    return {row["img_path"].partition("/")[2]: pose for row, pose in zip(rows, c2w, strict=True)}


def median_offset(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Median distance in m and angle in deg between two lists of poses."""
    first, second = torch.stack(a), torch.stack(b)
    angles = rotation_angle_deg(first[:, :3, :3], second[:, :3, :3])
    return float((first - second)[:, :3, 3].norm(dim=1).median()), float(angles.median())


MEASURED = {  # scene -> frames, and offset between the two ground truths: median m, deg of train and of test
    "chess": (4000, 2000, 0.0373, 1.374, 0.0353, 1.325),
    "fire": (2000, 2000, 0.0222, 1.272, 0.0237, 1.159),
    "heads": (1000, 1000, 0.0134, 1.132, 0.0114, 1.311),
    "office": (6000, 4000, 0.0773, 2.916, 0.0782, 2.959),
    "pumpkin": (4000, 2000, 0.0636, 1.968, 0.0692, 3.095),
    "redkitchen": (7000, 5000, 0.0650, 3.336, 0.0568, 3.201),
    "stairs": (2000, 1000, 0.0487, 1.632, 0.0289, 1.720),
}


@pytest.mark.dataset
@pytest.mark.parametrize("name", MEASURED)
def test_both_ground_truths_of_every_scene_agree_up_to_what_was_measured(real_scenes, name):
    folder, expected = real_scenes / "poses" / "7scenes" / name, MEASURED[name]
    for index, part in enumerate(("train", "test")):
        files = find_sfm_poses(folder)
        sfm = read_sfm_poses(files[index])
        original = original_poses(folder / f"poses_original_{part}.csv.gz")
        assert {pose.name for pose in sfm} == set(original) and len(sfm) == expected[index]
        sequences = read_sequences(folder / f"{part.title()}Split.txt")
        assert {pose.name.partition("/")[0] for pose in sfm} == set(sequences)
        assert all(520 < pose.focal < 530 for pose in sfm)
        distance, angle = median_offset([pose.c2w for pose in sfm], [original[pose.name] for pose in sfm])
        assert distance == pytest.approx(expected[2 + 2 * index], abs=1e-3)
        assert angle == pytest.approx(expected[3 + 2 * index], abs=0.01)


@pytest.mark.dataset
def test_real_slice_loads_under_both_ground_truths(real_scenes, tmp_path):
    folder = real_scenes / "redkitchen_original" / "redkitchen"
    sfm, dslam = parse_seven_scenes(folder, gt="sfm"), parse_seven_scenes(folder, gt="dslam")
    assert parse_seven_scenes(folder).ground_truth == "sfm" and sfm.lists is None
    assert len(sfm.frames) == len(dslam.frames) == 30 and not sfm.skipped and not dslam.skipped
    assert sfm.frames[0].lens.camera == Camera(640, 480, 525.505, 525.505, 320.0, 240.0)
    distance, angle = median_offset([frame.c2w for frame in sfm.frames], [frame.c2w for frame in dslam.frames])
    assert distance == pytest.approx(0.0877, abs=2e-3)  # depth against colour camera, and KinectFusion's drift
    assert angle == pytest.approx(4.035, abs=0.05)
    for capture in (sfm, dslam):
        assert_same(*round_trip(capture, tmp_path / capture.ground_truth))
    shutil.rmtree(tmp_path / "sfm")
    scene = load_scene(folder, max_side=80)
    assert scene.n_views == 30 and scene.ground_truth == "sfm" and scene.counts()["test"] > 0
