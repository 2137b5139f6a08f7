"""TUM RGB-D sequences (Sturm et al., IROS 2012): rgb.txt and groundtruth.txt, matched by time.

rgb.txt          "timestamp filename"
groundtruth.txt  "timestamp tx ty tz qx qy qz qw", camera-to-world of the colour camera, scalar LAST, metres
calibration.txt  "fx fy cx cy [k1 k2 p1 p2 [k3]]", not part of the data set: to be added for another camera
Axes are OpenCV. Calibrations of this data set are OpenCV's: cx, cy count from the middle of the first pixel, so 0.5
is added to both to have them from the image's corner.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from posemap_fast.data.capture import Capture, Frame, Parser, natural_order, register_parser
from posemap_fast.data.image_files import read_image
from posemap_fast.data.pose_lines import (
    PoseTable,
    check_focal,
    existing_file,
    parse_numbers,
    read_pose_table,
    read_rows,
    rotations,
)
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, Lens, make_c2w

__all__ = ["parse_tum_rgbd", "read_tum_poses"]

MAX_TIME_DIFFERENCE = 0.02  # s between image and pose, as in the data set's own `associate.py`
_CALIBRATIONS = {  # "Intrinsic camera calibration of the Kinect", the data set's page of file formats; 640x480
    "1": (517.3, 516.5, 318.6, 255.3, 0.2624, -0.9531, -0.0054, 0.0026, 1.1633),
    "2": (520.9, 521.0, 325.1, 249.7, 0.2312, -0.7849, -0.0033, -0.0001, 0.9172),
    "3": (535.4, 539.2, 320.1, 247.6),  # its images are undistorted already
}
_SIZE = (640, 480)


def _times(table: PoseTable) -> torch.Tensor:
    """(n,) float64 seconds, from the first column."""
    times = [parse_numbers(where, [name])[0] for where, name in zip(table.where, table.names, strict=True)]
    for where, time in zip(table.where, times, strict=True):
        if not np.isfinite(time):
            raise DatasetError(f"{where}: the time must be finite; got {time}; correct or remove the line")
    return torch.tensor(times, dtype=torch.float64)


def read_tum_poses(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a groundtruth.txt, plain or gzipped: times (n,) in seconds, ascending, and c2w (n, 4, 4), both float64.

    Raises:
        DatasetError: unreadable or damaged, with file, line, value and mend.
    """
    table = read_pose_table(path, "timestamp tx ty tz qx qy qz qw")
    times = _times(table)
    c2w = make_c2w(rotations(table, table.values[:, [6, 3, 4, 5]]), table.values[:, :3])
    order = times.argsort(stable=True)
    return times[order], c2w[order]


def _read_images(path: Path) -> list[tuple[float, str, str]]:
    """(time, file name, place for errors) of each line of rgb.txt."""
    found = []
    for row in read_rows(path):
        if len(row.columns) != 2:
            raise DatasetError(
                f"{row.where}: must be 'timestamp filename'; got {len(row.columns)} columns; correct the line"
            )
        time = parse_numbers(row.where, row.columns[:1])[0]
        found.append((time, PurePosixPath(row.columns[1]).as_posix(), row.where))
    if not found:
        raise DatasetError(f"{path}: names no image; restore it")
    return found


def _nearest(times: torch.Tensor, wanted: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the nearest of ascending times to each wanted one, and the differences (NaN for NaN)."""
    query = torch.tensor(wanted, dtype=torch.float64)
    after = torch.searchsorted(times, query).clamp(0, len(times) - 1)
    before = (after - 1).clamp_min(0)
    nearest = torch.where(query - times[before] < times[after] - query, before, after)
    return nearest, (times[nearest] - query).abs()


def _calibration(path: Path, size: tuple[int, int]) -> Lens:
    """The lens of calibration.txt, or the data set's for the camera named by the folder, for images of `size`."""
    file = path / "calibration.txt"
    if file.is_file():
        values = [v for row in read_rows(file) for v in parse_numbers(row.where, row.columns)]
        if len(values) not in (4, 8, 9) or not np.isfinite(values).all():
            raise DatasetError(
                f"{file}: must hold 'fx fy cx cy', optionally followed by 'k1 k2 p1 p2' and 'k3', all finite; got "
                f"{len(values)} numbers; correct the file"
            )
        return _lens(str(file), values, size)
    named = re.search(r"freiburg([123])", path.resolve().name)
    if named is None:
        raise DatasetError(
            f"{path}: no calibration.txt, and the folder's name has no freiburg1, 2 or 3; add calibration.txt with "
            "'fx fy cx cy' in pixels"
        )
    lens = _lens(str(path), _CALIBRATIONS[named[1]], _SIZE)
    return Lens(lens.camera.resized(*size), lens.model, lens.coefficients)


def _lens(where: str, values: Sequence[float], size: tuple[int, int]) -> Lens:
    fx, fy = (check_focal(where, value) for value in values[:2])
    camera = Camera(*size, fx, fy, values[2] + 0.5, values[3] + 0.5)
    return Lens(camera, "opencv", tuple(values[4:])) if any(values[4:]) else Lens(camera)


def parse_tum_rgbd(path: Path) -> Capture:
    """Read one sequence; an image takes the pose nearest in time, and is left out and counted without one in 0.02 s.

    The camera is that of calibration.txt, else the data set's for a folder called *freiburg1*, *freiburg2* or
    *freiburg3* (1 and 2 with their distortion). All images have the size of the first. There is no official split.

    Args:
        path: the sequence's folder.
    Raises:
        DatasetError: damaged or missing files, with file, line, value and mend.
    """
    times, c2w = read_tum_poses(path / "groundtruth.txt")
    listed = _read_images(path / "rgb.txt")
    nearest, differences = _nearest(times, [time for time, _, _ in listed])
    matched = (differences <= MAX_TIME_DIFFERENCE).tolist()
    frames: dict[str, Frame] = {}
    lens: Lens | None = None
    for (_, name, where), index, is_matched in zip(listed, nearest.tolist(), matched, strict=True):
        if not is_matched:
            continue
        if name in frames:
            raise DatasetError(f"{where}: '{name}' is listed twice; remove one of the lines")
        image = existing_file(path, name, where)
        lens = lens or _calibration(path, read_image(image).shape[1::-1])
        frames[name] = Frame(name, image, c2w[index], lens)
    reason = f"no pose within {MAX_TIME_DIFFERENCE} s in groundtruth.txt"
    return Capture(
        name=path.resolve().name,
        source=path,
        frames=sorted(frames.values(), key=lambda frame: natural_order(frame.name)),
        is_metric=True,
        skipped={reason: len(listed) - len(frames)} if len(frames) < len(listed) else {},
    )


def _recognises(path: Path) -> bool:
    return (path / "rgb.txt").is_file() and (path / "groundtruth.txt").is_file()


register_parser(
    "tum_rgbd", Parser(_recognises, parse_tum_rgbd, "a TUM RGB-D sequence with rgb.txt and groundtruth.txt")
)
