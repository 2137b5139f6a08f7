"""7-Scenes (Shotton et al., CVPR 2013): RGB-D sequences of seven rooms, with two ground truths.

dslam: `frame-*.pose.txt`, camera-to-world of the depth camera as KinectFusion tracked it. The colour image is taken as
    the depth camera's, with f = 525, which leaves about 3.2 px of epipolar error in RedKitchen; f = 585 (the depth
    focal length that many loaders use) leaves 7.6 px.
sfm: pseudo ground truth of the colour camera (Brachmann et al., ICCV 2021), lines "name qw qx qy qz tx ty tz f",
    world-to-camera, about 1 px.
Their poses differ by 1 to 8 cm and 1.1 to 3.4 deg in the median of a scene, so errors against one say little about
the other: a table must name its ground truth, which is `Capture.ground_truth`.
Both have OpenCV axes, metres, and images of 640x480 with the principal point in the middle.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from posemap_fast.data.capture import Capture, Frame, Parser, natural_order, register_parser
from posemap_fast.data.image_files import read_image
from posemap_fast.data.pose_lines import (
    NO_POSE,
    check_focal,
    existing_file,
    list_files,
    read_matrix,
    read_pose_table,
    read_rows,
    rotations,
    unique_names,
    valid_pose,
)
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens, invert_c2w, make_c2w

__all__ = ["SfmPose", "find_sfm_poses", "parse_seven_scenes", "read_sequences", "read_sfm_poses"]

DSLAM_FOCAL = 525.0  # pixels at 640x480
_IMAGE = ".color.png"
_SEQUENCE = re.compile(r"(?:sequence|seq-?)0*(\d{1,4})", re.IGNORECASE)
_LOG = logging.getLogger(__name__)


class SfmPose(NamedTuple):
    """One line of an SfM pseudo ground truth file."""

    name: str  # "seq-01/frame-000000.color.png"
    c2w: torch.Tensor  # (4, 4) float64 OpenCV camera-to-world, metres
    focal: float  # pixels of the 640x480 image


def read_sfm_poses(path: Path) -> list[SfmPose]:
    """Read a pseudo ground truth file, plain or gzipped: "name qw qx qy qz tx ty tz f", world-to-camera.

    Raises:
        DatasetError: unreadable or damaged, with file, line, value and mend.
    """
    table = read_pose_table(path, "name qw qx qy qz tx ty tz f")
    w2c = make_c2w(rotations(table, table.values[:, :4]), table.values[:, 4:7])
    focals = [check_focal(w, f) for w, f in zip(table.where, table.values[:, 7].tolist(), strict=True)]
    return [SfmPose(*line) for line in zip(unique_names(table), invert_c2w(w2c), focals, strict=True)]


def read_sequences(path: Path) -> list[str]:
    """Folder names ("seq-01") of a TrainSplit.txt or TestSplit.txt; "sequence1", "seq-01" and "seq1" are the same.

    Raises:
        DatasetError: unreadable, empty, or another word.
    """
    found = []
    for row in read_rows(path):
        match = _SEQUENCE.fullmatch(" ".join(row.columns))
        if match is None:
            raise DatasetError(f"{row.where}: '{' '.join(row.columns)[:40]}' is no sequence; write it as 'sequence1'")
        found.append(f"seq-{int(match[1]):02d}")
    if not found:
        raise DatasetError(f"{path}: names no sequence; restore the official list")
    return list(dict.fromkeys(found))


def find_sfm_poses(scene: Path, sfm_poses: str = "") -> list[Path]:
    """The pseudo ground truth files of a scene, for training and for testing, as far as they exist.

    Looked for in the scene's folder, its parent and `7scenes_sfm` beside the scene; or only in `sfm_poses` when it is
    a folder. A file is `<scene>_train.txt`, or has `sfm` and `train` in its name and, unless its folder is called as
    the scene is, the scene; the same with `test`; `.gz` may follow. The first folder with one counts.

    Args:
        scene: the scene's folder.
        sfm_poses: a file, which is then the only one, or a folder.
    Raises:
        DatasetError: `sfm_poses` leads to nothing.
    """
    named = Path(sfm_poses)
    if sfm_poses and named.is_file():
        return [named]
    scene = scene.resolve()
    folders = [named] if sfm_poses else [scene, scene.parent, scene.parent / "7scenes_sfm"]
    found = [_pose_file(folders, scene, part) for part in ("train", "test")]
    if sfm_poses and not any(found):
        raise DatasetError(
            f"{sfm_poses}: no file {scene.name}_train.txt or {scene.name}_test.txt; name the file itself"
        )
    return [path for path in found if path is not None]


def _pose_file(folders: Sequence[Path], scene: Path, part: str) -> Path | None:
    for folder in folders:
        try:
            names = sorted(entry.name for entry in folder.iterdir())
        except OSError:
            continue
        texts = [name for name in names if name.lower().endswith((".txt", ".txt.gz"))]
        exact = [name for name in texts if name.lower().startswith(f"{scene.name.lower()}_{part}.txt")]
        is_own = folder.name.lower() == scene.name.lower()
        of_scene = [name for name in texts if is_own or scene.name.lower() in name.lower()]
        found = [*exact, *(name for name in of_scene if "sfm" in name.lower() and part in name.lower())]
        if found:
            return folder / found[0]
    return None


class _Poses(NamedTuple):
    """Where the poses come from: `of(frame name)` gives c2w and focal length, or the reason why there is none."""

    name: str  # sfm, dslam
    of: Callable[[str], tuple[torch.Tensor, float] | str]
    sources: str  # for messages


def _dslam(root: Path) -> _Poses:
    def of(name: str) -> tuple[torch.Tensor, float] | str:
        c2w = valid_pose(read_matrix(existing_file(root, name.removesuffix(_IMAGE) + ".pose.txt", str(root / name))))
        return NO_POSE if c2w is None else (c2w, DSLAM_FOCAL)

    return _Poses("dslam", of, "its pose.txt files")


def _sfm(files: Sequence[Path]) -> _Poses:
    known: Mapping[str, SfmPose] = {pose.name: pose for path in files for pose in read_sfm_poses(path)}

    def of(name: str) -> tuple[torch.Tensor, float] | str:
        pose = known.get(name)
        return "no pose in the SfM ground truth" if pose is None else (pose.c2w, pose.focal)

    return _Poses("sfm", of, ", ".join(path.name for path in files))


def _ground_truth(path: Path, gt: str, sfm_poses: str) -> _Poses:
    if gt not in ("auto", "sfm", "dslam"):
        raise ConfigError(f"7scenes: gt must be auto, sfm or dslam; got {gt!r}")
    if gt == "dslam" and sfm_poses:
        raise ConfigError("7scenes: sfm_poses is not used with gt=dslam; leave one of them out")
    if gt == "dslam":
        return _dslam(path)
    files = find_sfm_poses(path, sfm_poses)
    if not files and gt == "sfm":
        raise DatasetError(
            f"{path}: no SfM pseudo ground truth found (as {path.resolve().name}_train.txt, here, in the folder above "
            "or in its 7scenes_sfm); name it with sfm_poses, or use gt=dslam"
        )
    poses = _sfm(files) if files else _dslam(path)
    _LOG.info("%s: %s ground truth, from %s", path, poses.name, poses.sources)
    return poses


class _Cameras:
    """The lens of each focal length, at the stored images' size, which the first image tells."""

    def __init__(self, first_image: Path):
        self._height, self._width = read_image(first_image).shape[:2]
        self._lenses: dict[float, Lens] = {}

    def lens(self, focal: float) -> Lens:
        if focal not in self._lenses:
            official = Camera(640, 480, focal, focal, 320.0, 240.0)
            self._lenses[focal] = Lens(official.resized(self._width, self._height))
        return self._lenses[focal]


def parse_seven_scenes(path: Path, gt: str = "auto", stride: int = 1, sfm_poses: str = "") -> Capture:
    """Read one scene: TrainSplit.txt, TestSplit.txt, seq-NN/frame-NNNNNN.{color.png,pose.txt}; depth is not read.

    Frames without a valid pose (lost tracking) are left out and counted. Where both lists name the same sequence,
    there is no official split, and the rule for sequences and blocks applies.

    Args:
        path: the scene's folder.
        gt: sfm (see `find_sfm_poses` for where it is looked for), dslam, or auto: sfm if its files are found.
        stride: take every stride-th frame of each sequence.
        sfm_poses: file or folder of the pseudo ground truth; may lie anywhere.
    Raises:
        DatasetError: damaged or missing files, with file, line, value and mend.
        ConfigError: an impossible option.
    """
    if not isinstance(stride, int) or stride < 1:
        raise ConfigError(f"7scenes: stride must be a whole number of at least 1; got {stride!r}")
    parts = {part: read_sequences(path / f"{part.title()}Split.txt") for part in ("train", "test")}
    poses = _ground_truth(path, gt, sfm_poses)
    listed = {s: list_files(path, s, _IMAGE)[::stride] for s in dict.fromkeys(parts["train"] + parts["test"])}
    names = sorted((name for names in listed.values() for name in names), key=natural_order)
    if not names:
        raise DatasetError(f"{path}: its sequences hold no frame-*{_IMAGE}; unpack them")
    images = {name: existing_file(path, name, str(path)) for name in names}
    cameras, skipped, frames = _Cameras(images[names[0]]), Counter[str](), []
    for name in names:
        found = poses.of(name)
        if isinstance(found, str):
            skipped[found] += 1
        else:
            frames.append(Frame(name, images[name], found[0], cameras.lens(found[1])))
    return Capture(
        name=path.resolve().name,
        source=path,
        frames=frames,
        is_metric=True,
        lists=_lists(path, parts, frames, poses, stride),
        ground_truth=poses.name,
        skipped=dict(skipped),
    )


def _lists(
    path: Path, parts: Mapping[str, Sequence[str]], frames: Sequence[Frame], poses: _Poses, stride: int
) -> dict[str, object] | None:
    """The official split of the frames; None where it would put a frame in both parts."""
    shared = sorted(set(parts["train"]) & set(parts["test"]))
    if shared:
        _LOG.warning("%s: TrainSplit.txt and TestSplit.txt both name %s; split by rule instead", path, shared[0])
        return None
    found = {
        part: [frame.name for frame in frames if frame.name.partition("/")[0] in sequences]
        for part, sequences in parts.items()
    }
    for part, sequences in parts.items():
        if not found[part]:
            raise DatasetError(
                f"{path}: no frame of the {part} sequences ({', '.join(sequences)}) has a pose in {poses.sources}; "
                "add the missing poses or choose another gt"
            )
    every = f"; every {stride}. frame of each" if stride > 1 else ""
    rule = f"official sequences; train {', '.join(parts['train'])}; test {', '.join(parts['test'])}{every}"
    return {"rule": rule, **found}


def _recognises(path: Path) -> bool:
    return (path / "TrainSplit.txt").is_file() or (path / "TestSplit.txt").is_file()


register_parser(
    "7scenes",
    Parser(_recognises, parse_seven_scenes, "a 7-Scenes folder with TrainSplit.txt, TestSplit.txt and seq-01, ..."),
)
