"""The text form of a COLMAP model: cameras.txt, images.txt, points3D.txt, line by line.

Lines that start with # are comments. An image has two lines: its pose, then its 2D points, which may be empty and is
not read further. Nothing is believed that the file itself does not hold.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posemap_fast.data.colmap_cameras import LARGEST, CameraRecord, ImageRecord
from posemap_fast.errors import DatasetError

__all__ = ["count_images", "read_cameras", "read_images", "read_points"]

_LONGEST_LINE = 1 << 26  # bytes; an image with a million points has 40 MB
_MOST_DIGITS = 20  # of a number with 64 bits
_MEND = "export the model again"
_POSE = "IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME"
_POINT = "POINT3D_ID X Y Z R G B ERROR"


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every line, stripped."""
    number = 0
    try:
        with path.open("rb") as file:
            while raw := file.readline(_LONGEST_LINE):
                number += 1
                where = f"{path}: line {number}"
                if len(raw) == _LONGEST_LINE:
                    raise DatasetError(f"{where}: longer than {_LONGEST_LINE >> 20} MiB; {_MEND}")
                yield where, raw.decode("utf-8").strip()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read: {error.strerror}; restore the file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: line {number}: not UTF-8 text ({error.reason}); {_MEND}") from error


def _data_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Lines that are neither empty nor a comment."""
    return ((where, text) for where, text in _lines(path) if text and not text.startswith("#"))


def _image_lines(path: Path) -> Iterator[tuple[str, str]]:
    """The first line of every image; the second is only checked to be one."""
    lines = _lines(path)
    for where, text in lines:
        if not text or text.startswith("#"):
            continue
        yield where, text
        second, points = next(lines, ("", ""))
        if len(points.split()) % 3:
            raise DatasetError(
                f"{second}: POINTS2D: must be triples X Y POINT3D_ID, or an empty line after each image; got "
                f"{points[:60]!r}; {_MEND}"
            )


def _floats(where: str, what: str, tokens: list[str]) -> tuple[float, ...]:
    try:
        values = tuple(map(float, tokens))
    except ValueError as error:
        raise DatasetError(f"{where}: {what}: must be numbers; got {' '.join(tokens)[:60]!r}; {_MEND}") from error
    bad = next((token for token, value in zip(tokens, values, strict=True) if not abs(value) < LARGEST), None)
    if bad is not None:
        raise DatasetError(f"{where}: {what}: must be finite and below {LARGEST:g}; got {bad[:40]!r}; {_MEND}")
    return values


def _whole(where: str, what: str, token: str) -> int:
    if not token.isdecimal() or len(token) > _MOST_DIGITS:
        raise DatasetError(f"{where}: {what}: must be a whole number >= 0; got {token[:40]!r}; {_MEND}")
    return int(token)


def read_cameras(path: Path) -> Iterator[CameraRecord]:
    """The cameras of cameras.txt.

    Raises:
        DatasetError: a damaged line, with its number.
    """
    for where, text in _data_lines(path):
        tokens = text.split()
        if len(tokens) < 5:
            raise DatasetError(
                f"{where}: must be CAMERA_ID MODEL WIDTH HEIGHT PARAMS; got {len(tokens)} values; {_MEND}"
            )
        width, height = (_whole(where, "WIDTH HEIGHT", token) for token in tokens[2:4])
        camera_id = _whole(where, "CAMERA_ID", tokens[0])
        yield CameraRecord(where, camera_id, tokens[1], width, height, _floats(where, "PARAMS", tokens[4:]))


def read_images(path: Path) -> Iterator[ImageRecord]:
    """The registered images of images.txt; a name may hold spaces.

    Raises:
        DatasetError: a damaged line, with its number.
    """
    for where, text in _image_lines(path):
        tokens = text.split(maxsplit=9)
        if len(tokens) < 10:
            raise DatasetError(f"{where}: must be {_POSE}; got {len(tokens)} values; {_MEND}")
        image_id, camera_id = _whole(where, "IMAGE_ID", tokens[0]), _whole(where, "CAMERA_ID", tokens[8])
        yield ImageRecord(where, image_id, _floats(where, "QW QX QY QZ TX TY TZ", tokens[1:8]), camera_id, tokens[9])


def count_images(path: Path) -> int:
    """Registered images of images.txt."""
    return sum(1 for _ in _image_lines(path))


def read_points(path: Path) -> np.ndarray:
    """Positions (p, 3) float64 of points3D.txt, world unit.

    Raises:
        DatasetError: a damaged line, with its number.
    """
    xyz = array("d")
    for where, text in _data_lines(path):
        tokens = text.split(maxsplit=8)
        if len(tokens) < 8:
            raise DatasetError(f"{where}: must be {_POINT} TRACK; got {len(tokens)} values; {_MEND}")
        xyz.extend(_floats(where, "X Y Z", tokens[1:4]))
    return np.array(xyz).reshape(-1, 3)
