"""Cambridge Landmarks (Kendall et al., ICCV 2015): photographs of buildings with poses from structure from motion.

Two layouts:
official   dataset_train.txt, dataset_test.txt: three lines of header, then "name X Y Z W P Q R": the camera's centre
           in metres and the WORLD-TO-CAMERA quaternion, scalar first. reconstruction.nvm has focal length and radial
           distortion of each image at 1920x1080; its poses are not used.
converted  {train,test}/{rgb,poses,calibration}/, as DSAC* and ACE prepare it: a 4x4 camera-to-world matrix and the
           focal length in pixels of the stored image (or K) for each image, in files of the same name.
Axes are OpenCV in both. Frames are used as listed: DFNet drops seq2/frame00036 and seq2/frame00043 of ShopFacade,
which stay here. Quaternions have norms up to 1.045 (StMarysChurch) and are normalised.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from posemap_fast.data.capture import Capture, Frame, Parser, natural_order, register_parser
from posemap_fast.data.image_files import read_image
from posemap_fast.data.nvm import NvmCamera, measurement_lens, read_nvm_cameras, stem
from posemap_fast.data.pose_lines import (
    NO_POSE,
    Row,
    check_focal,
    existing_file,
    list_files,
    parse_numbers,
    read_matrix,
    read_pose_table,
    read_rows,
    rotations,
    unique_names,
    valid_pose,
)
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, Lens, make_c2w

__all__ = ["CambridgePose", "parse_cambridge", "read_cambridge_poses"]

WIDTH, HEIGHT = 1920, 1080  # of the official images, which the focal lengths of reconstruction.nvm refer to
DEFAULT_FOCAL = 1670.0  # pixels at that size, as DSAC* takes it for all images
_N_HEADER = 3  # lines
_FAR = 1000  # times the median distance to the median centre; GreatCourt has a camera at 3.1e9 m
_TOO_FAR = f"its position is absurd (more than {_FAR} times farther off than the median camera)"
_TOO_BENT = "its radial distortion in reconstruction.nvm is absurd"
_PARTS = ("train", "test")
_LOG = logging.getLogger(__name__)


class CambridgePose(NamedTuple):
    """One line of an official list."""

    name: str  # "seq1/frame00001.png"
    c2w: torch.Tensor  # (4, 4) float64 OpenCV camera-to-world, metres


def _is_header(row: Row) -> bool:
    return row.number <= _N_HEADER and len(row.columns) != 8


def read_cambridge_poses(path: Path) -> list[CambridgePose]:
    """Read dataset_train.txt or dataset_test.txt, plain or gzipped, absurd positions included.

    Raises:
        DatasetError: unreadable or damaged, with file, line, value and mend.
    """
    table = read_pose_table(path, "name X Y Z W P Q R", _is_header)
    w2c = rotations(table, table.values[:, 3:])
    c2w = make_c2w(w2c.transpose(1, 2), table.values[:, :3])
    return [CambridgePose(*line) for line in zip(unique_names(table), c2w, strict=True)]


def _without_absurd(frames: list[Frame], skipped: Counter[str]) -> list[Frame]:
    """The frames that are not farther off than any building is wide."""
    if not frames:
        return frames
    centres = torch.stack([frame.c2w[:3, 3] for frame in frames])
    distances = (centres - centres.median(dim=0).values).norm(dim=1)
    limit = _FAR * float(distances.median())
    kept = [frame for frame, d in zip(frames, distances.tolist(), strict=True) if not (limit > 0 and d > limit)]
    skipped[_TOO_FAR] += len(frames) - len(kept)
    return kept


class _Lenses:
    """The lens of each image of the official layout, for the stored size, which the first image tells."""

    def __init__(self, path: Path, first_image: Path):
        height, width = read_image(first_image).shape[:2]
        sized = abs(WIDTH * height / width - HEIGHT) < 10  # 852x480 and 854x480 are 16:9 rounded
        self._full = (WIDTH, HEIGHT if sized else round(WIDTH * height / width) or 1)
        self._size = width, height
        self._source = path / "reconstruction.nvm"
        self._known = read_nvm_cameras(self._source) if self._source.is_file() else {}
        focal = float(np.median([c.focal for c in self._known.values()])) if self._known else DEFAULT_FOCAL
        self._default = NvmCamera(focal, 0.0)

    def lens(self, name: str) -> Lens | None:
        focal, radial = self._known.get(stem(name), self._default)
        width, height = self._full
        return measurement_lens(Camera(width, height, focal, focal, width / 2, height / 2).resized(*self._size), radial)

    def log(self, names: Sequence[str]) -> None:
        """Warn about images whose calibration is a guess."""
        unknown = sum(stem(name) not in self._known for name in names)
        if unknown:
            _LOG.warning(
                "%s: has no camera for %d of %d images; f = %.1f px at %d px width is assumed",
                *(self._source, unknown, len(names), self._default.focal, WIDTH),
            )


def _official(path: Path, skipped: Counter[str]) -> dict[str, list[Frame]]:
    poses = {part: read_cambridge_poses(path / f"dataset_{part}.txt") for part in _PARTS}
    shared = sorted({pose.name for pose in poses["train"]} & {pose.name for pose in poses["test"]})
    if shared:
        raise DatasetError(f"{path / 'dataset_test.txt'}: '{shared[0]}' is also in dataset_train.txt; remove one")
    images = {
        pose.name: existing_file(path, pose.name, str(path / f"dataset_{part}.txt"))
        for part in _PARTS
        for pose in poses[part]
    }
    lenses = _Lenses(path, next(iter(images.values())))
    lenses.log(list(images))
    frames: dict[str, list[Frame]] = {part: [] for part in _PARTS}
    for part in _PARTS:
        for name, c2w in poses[part]:
            lens = lenses.lens(name)
            if lens is None:
                skipped[_TOO_BENT] += 1
            else:
                frames[part].append(Frame(name, images[name], c2w, lens))
    return frames


def _partners(root: Path, folder: str) -> dict[str, str]:
    """Key of an image ("seq1_frame00001") -> its text file in a folder of the converted layout."""
    return {_key(name): name for name in list_files(root, folder, ".txt")}


def _key(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _partner(root: Path, name: str, files: Mapping[str, str], kind: str) -> Path:
    if _key(name) not in files:
        raise DatasetError(f"{root / name}: has no {_key(name)}.txt in {kind}; restore it or remove the image")
    return existing_file(root, files[_key(name)], str(root))


def _calibration(path: Path, size: tuple[int, int]) -> Lens:
    """The pinhole camera of one focal length, or of a 3x3 K with its principal point."""
    values = [v for row in read_rows(path) for v in parse_numbers(row.where, row.columns)]
    if len(values) not in (1, 9):
        raise DatasetError(f"{path}: must hold a focal length, or K as 3x3 numbers; got {len(values)}; restore it")
    fx, fy = (check_focal(str(path), value) for value in (values[0], values[4 if len(values) == 9 else 0]))
    cx, cy = (values[2], values[5]) if len(values) == 9 else (size[0] / 2, size[1] / 2)
    if not (abs(cx) <= size[0] and abs(cy) <= size[1]):
        raise DatasetError(f"{path}: principal point must lie in the image of {size}; got {cx}, {cy}; correct it")
    return Lens(Camera(*size, fx, fy, cx, cy))


def _converted_part(root: Path, part: str, skipped: Counter[str]) -> Iterator[Frame]:
    names = list_files(root, f"{part}/rgb", (".png", ".jpg", ".jpeg"))
    poses, calibrations = (_partners(root, f"{part}/{kind}") for kind in ("poses", "calibration"))
    size: tuple[int, int] | None = None
    lenses: dict[Lens, Lens] = {}  # equal ones are one, as the undistortion maps are kept by lens
    for name in names:
        image = existing_file(root, name, str(root))
        size = size or read_image(image).shape[1::-1]
        c2w = valid_pose(read_matrix(_partner(root, name, poses, "poses")))
        lens = _calibration(_partner(root, name, calibrations, "calibration"), size)
        if c2w is None:
            skipped[NO_POSE] += 1
        else:
            yield Frame(name, image, c2w, lenses.setdefault(lens, lens))


def parse_cambridge(path: Path) -> Capture:
    """Read one scene, official or converted; the size of all images is that of the first.

    The focal lengths of reconstruction.nvm are those of 1920x1080 images and follow the stored size; its radial
    distortion becomes a lens (see `nvm`). Without the file f is 1670 px at that width. Absurd positions (GreatCourt,
    train, seq5/frame00297) are left out and counted.

    Args:
        path: the scene's folder.
    Raises:
        DatasetError: damaged or missing files, with file, line, value and mend.
    """
    skipped: Counter[str] = Counter()
    if _is_converted(path):
        parts = {part: list(_converted_part(path, part, skipped)) for part in _PARTS}
        rule = "lists as converted (train, test folders)"
    else:
        parts, rule = _official(path, skipped), "official lists (dataset_train.txt, dataset_test.txt)"
    frames = sorted(_without_absurd([f for part in _PARTS for f in parts[part]], skipped), key=_order)
    kept = {frame.name for frame in frames}
    lists = {part: sorted((f.name for f in parts[part] if f.name in kept), key=natural_order) for part in _PARTS}
    return Capture(
        name=path.resolve().name,
        source=path,
        frames=frames,
        is_metric=True,
        lists={"rule": rule, **lists},
        skipped={reason: count for reason, count in skipped.items() if count},
    )


def _order(frame: Frame) -> list[tuple[int, int, str]]:
    return natural_order(frame.name)


def _is_converted(path: Path) -> bool:
    return all((path / part / kind).is_dir() for part in _PARTS for kind in ("rgb", "poses"))


def _recognises(path: Path) -> bool:
    return any((path / f"dataset_{part}.txt").is_file() for part in _PARTS) or _is_converted(path)


register_parser(
    "cambridge",
    Parser(
        _recognises,
        parse_cambridge,
        "a Cambridge Landmarks folder with dataset_train.txt and dataset_test.txt, or {train,test}/{rgb,poses}",
    ),
)
