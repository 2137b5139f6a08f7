"""The binary form of a COLMAP model: cameras.bin, images.bin, points3D.bin, little endian.

Every count in a file is compared with the bytes that follow it before anything is made of it, so that a damaged or
hostile file costs neither memory nor time beyond its own size.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posemap_fast.data.colmap_cameras import CAMERA_MODELS, LARGEST, CameraRecord, ImageRecord
from posemap_fast.errors import DatasetError

__all__ = ["count_images", "read_cameras", "read_images", "read_points"]

_MEND = "copy the file again or export the model again"
_COUNT = struct.Struct("<Q")
_CAMERA = struct.Struct("<IiQQ")  # id, model, width, height; then the parameters
_IMAGE = struct.Struct("<I7dI")  # id, pose, camera id; then the name, 0, the 2D points
_POINT = struct.Struct("<Q3d3BdQ")  # id, position, colour, error, length of the track; then the track
_POINT_2D = 24  # bytes: x, y, id of the 3D point
_TRACK_ELEMENT = 8  # bytes: id of the image, index of the 2D point
_LEAST = {  # bytes of the smallest record
    "cameras": _CAMERA.size + 8 * min(model.n_parameters for model in CAMERA_MODELS.values()),
    "images": _IMAGE.size + 1 + _COUNT.size,
    "points": _POINT.size,
}
_MODEL_NAMES = {model.number: name for name, model in CAMERA_MODELS.items()}


class _Reader:
    """Reads on from the start of a file; never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    @property
    def where(self) -> str:
        return f"{self.path}: byte {self.at}"

    def take(self, record: struct.Struct) -> tuple:
        if self.at + record.size > len(self.data):
            raise DatasetError(f"{self.where}: the file ends after {len(self.data)} bytes, amid a record; {_MEND}")
        values = record.unpack_from(self.data, self.at)
        self.at += record.size
        return values

    def expect(self, count: int, each: int, what: str) -> int:
        """`count` if so many records of at least `each` bytes can follow."""
        left = len(self.data) - self.at
        if count * each > left:
            raise DatasetError(f"{self.where}: claims {count} {what}, but only {left} bytes follow; {_MEND}")
        return count

    def skip(self, count: int, each: int, what: str) -> None:
        self.at += self.expect(count, each, what) * each

    def text(self) -> str:
        """A name that ends with a zero byte."""
        end = self.data.find(b"\0", self.at)
        if end < 0:
            raise DatasetError(f"{self.where}: NAME: has no end; {_MEND}")
        try:
            name = self.data[self.at : end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{self.where}: NAME: not UTF-8 text ({error.reason}); {_MEND}") from error
        self.at = end + 1
        return name


@contextlib.contextmanager
def _records(path: Path, what: str) -> Iterator[tuple[_Reader, int]]:
    """A reader behind the header of a file, and the checked number of its records."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DatasetError(f"{path}: the file is empty; {_MEND}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DatasetError(f"{path}: cannot read: {error.strerror}; restore the file") from error
    with data:
        reader = _Reader(path, data)
        yield reader, reader.expect(reader.take(_COUNT)[0], _LEAST[what], what)


def _check_end(reader: _Reader) -> None:
    """Raise `DatasetError` for bytes that belong to no record: the number of records is wrong."""
    left = len(reader.data) - reader.at
    if left:
        raise DatasetError(f"{reader.where}: {left} bytes follow the last record; {_MEND}")


def read_cameras(path: Path) -> Iterator[CameraRecord]:
    """The cameras of cameras.bin.

    Raises:
        DatasetError: damaged file, with the byte.
    """
    with _records(path, "cameras") as (reader, count):
        for _ in range(count):
            where = reader.where
            camera_id, number, width, height = reader.take(_CAMERA)
            name = _MODEL_NAMES.get(number, f"number {number}")
            n_parameters = CAMERA_MODELS[name].n_parameters if number in _MODEL_NAMES else 0
            yield CameraRecord(where, camera_id, name, width, height, reader.take(struct.Struct(f"<{n_parameters}d")))
        _check_end(reader)


def read_images(path: Path) -> Iterator[ImageRecord]:
    """The registered images of images.bin.

    Raises:
        DatasetError: damaged file, with the byte.
    """
    with _records(path, "images") as (reader, count):
        for _ in range(count):
            where = reader.where
            image_id, *pose, camera_id = reader.take(_IMAGE)
            if not all(abs(value) < LARGEST for value in pose):
                raise DatasetError(
                    f"{where}: QW QX QY QZ TX TY TZ: must be finite and below {LARGEST:g}; got {pose}; {_MEND}"
                )
            yield ImageRecord(where, image_id, tuple(pose), camera_id, reader.text())
            reader.skip(reader.take(_COUNT)[0], _POINT_2D, "2D points")
        _check_end(reader)


def count_images(path: Path) -> int:
    """Registered images of images.bin, by its header."""
    with _records(path, "images") as (_, count):
        return count


def read_points(path: Path) -> np.ndarray:
    """Positions (p, 3) float64 of points3D.bin, world unit.

    Raises:
        DatasetError: damaged file, with the byte.
    """
    with _records(path, "points") as (reader, count):
        xyz = np.empty((count, 3))
        for index in range(count):
            start = reader.at
            _, x, y, z, *_, length = reader.take(_POINT)
            if not (abs(x) < LARGEST and abs(y) < LARGEST and abs(z) < LARGEST):
                raise DatasetError(
                    f"{path}: byte {start}: X Y Z: must be finite and below {LARGEST:g}; got {x} {y} {z}; {_MEND}"
                )
            xyz[index] = x, y, z
            reader.skip(length, _TRACK_ELEMENT, "track elements")
        _check_end(reader)
    return xyz
