"""Reading images from disk: complete, in RGB, undistorted and at the working size."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, Lens

__all__ = ["ImageLoader", "read_image", "working_size"]

_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length: TEM, RST0..7, SOI
_FRAME_HEADERS = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG markers SOF0..15
_MOST_PIXELS, _PIXELS_PER_BYTE = 1 << 28, 9000  # deflate packs at most 1032:1, 8 pixels to a byte


def working_size(camera: Camera, max_side: int | None) -> tuple[int, int]:
    """(width, height) after the longer side is limited to `max_side`; never enlarges."""
    longer = max(camera.width, camera.height)
    if max_side is None or longer <= max_side:
        return camera.width, camera.height
    return max(1, round(camera.width * max_side / longer)), max(1, round(camera.height * max_side / longer))


def _jpeg_is_complete(data: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan (thumbnails in the header have their own)."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _STANDALONE:
            at += 2
        elif marker == 0xDA:
            return data.find(b"\xff\xd9", at) >= 0
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _png_is_complete(data: bytes) -> bool:
    """Whether chunk follows chunk up to the end chunk; a decoder would first allocate what a chunk claims to hold."""
    at = 8
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if end > len(data):
            return False
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at = end
    return False


def _claimed_size(data: bytes) -> tuple[int, int]:
    """(width, height) that the header of a PNG or JPEG file claims; zeros for another file."""
    if data[:4] == b"\x89PNG" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAME_HEADERS:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        fill = marker == 0xFF or marker in _STANDALONE
        at += (1 if marker == 0xFF else 2) if fill else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 0, 0


def _defect(data: bytes) -> str | None:
    """What is wrong with the bytes of an image file that a decoder would pass over in silence, or pay dearly for."""
    if not data:
        return "the file is empty"
    width, height = _claimed_size(data)
    if width * height > min(_MOST_PIXELS, _PIXELS_PER_BYTE * len(data)):
        return f"{len(data)} bytes cannot hold the {width}x{height} pixels that its header claims"
    if data[:2] == b"\xff\xd8" and not _jpeg_is_complete(data):
        return f"JPEG of {len(data)} bytes is truncated (no end-of-image marker)"
    if data[:4] == b"\x89PNG" and not _png_is_complete(data):
        return f"PNG of {len(data)} bytes is truncated (no end chunk)"
    return None


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a whole image file; the orientation tag is ignored, as SfM tools do; alpha is dropped.

    Raises:
        DatasetError: missing, truncated or not an image.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read this image: {error.strerror}; restore the file") from error
    defect = _defect(data)
    if defect:
        raise DatasetError(f"{path}: {defect}; copy the file again")
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DatasetError(f"{path}: {len(data)} bytes that are no readable image; convert it to JPEG or PNG")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class ImageLoader:
    """Reads the images of a list of files as the shared camera sees them: checked, undistorted, resampled, resized.

    Args:
        paths: n files.
        lenses: of the stored images, n.
        target: the shared pinhole camera, at the stored images' resolution.
        size: working (width, height).
    """

    def __init__(self, paths: Sequence[Path], lenses: Sequence[Lens], target: Camera, size: tuple[int, int]):
        self._paths, self._lenses, self._target, self._size = paths, lenses, target, size
        self._maps = functools.lru_cache(maxsize=4)(self._sampling_map)

    def key(self) -> str:
        """What decides the decoded images: files with their sizes and times, cameras, size."""
        digest = hashlib.sha256(repr((self._target, self._size)).encode())
        for path, lens in zip(self._paths, self._lenses, strict=True):
            digest.update(repr((str(path), *_stamp(path), lens)).encode())
        return digest.hexdigest()[:32]

    def _sampling_map(self, lens: Lens) -> tuple[np.ndarray, np.ndarray]:
        where = np.nan_to_num(lens.sampling_map(self._target), nan=-1e6, posinf=1e6, neginf=-1e6)
        return np.ascontiguousarray(where[..., 0]), np.ascontiguousarray(where[..., 1])

    def __call__(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB.

        Raises:
            DatasetError: a damaged image, or one whose size is not its camera's.
        """
        path, lens = self._paths[index], self._lenses[index]
        image, camera = read_image(path), lens.camera
        if image.shape[1::-1] != (camera.width, camera.height):
            raise DatasetError(
                f"{path}: image is {image.shape[1]}x{image.shape[0]} but w, h say {camera.width}x{camera.height}; "
                "give the intrinsics of the stored images"
            )
        if not lens.is_pinhole or camera != self._target:
            image = cv2.remap(image, *self._maps(lens), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        if image.shape[1::-1] == self._size:
            return image
        return cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of change; zeros for a missing file, which reading reports."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
