"""Reading images from disk: complete, in RGB, undistorted and at the working size, on a pool of threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera

__all__ = ["ImageSpec", "load_images", "read_image", "working_size"]

_PNG_END = b"IEND\xaeB`\x82"
_STANDALONE = {0x01, *range(0xD0, 0xD9)}  # JPEG markers without a length: TEM, RST0..7, SOI


@dataclass(frozen=True)
class ImageSpec:
    """What stored images must be and what they become."""

    camera: Camera  # of the stored images
    distortion: tuple[float, ...] = ()  # OpenCV's k1 k2 p1 p2 [k3]; empty for a pinhole
    size: tuple[int, int] = (0, 0)  # working (width, height)


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


def _defect(data: bytes) -> str | None:
    """What is wrong with the bytes of an image file that a decoder would pass over in silence."""
    if not data:
        return "the file is empty"
    if data[:2] == b"\xff\xd8" and not _jpeg_is_complete(data):
        return f"JPEG of {len(data)} bytes is truncated (no end-of-image marker)"
    if data[:4] == b"\x89PNG" and _PNG_END not in data[-64:]:
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


def _undistortion_maps(spec: ImageSpec) -> tuple[np.ndarray, np.ndarray] | None:
    """Where each pixel of the pinhole image lies in the stored one; None without distortion."""
    if not any(spec.distortion):
        return None
    k = spec.camera.K.numpy().copy()
    k[:2, 2] -= 0.5  # OpenCV puts pixel centres at integers
    size = (spec.camera.width, spec.camera.height)
    return cv2.initUndistortRectifyMap(k, np.array(spec.distortion), np.eye(3), k, size, cv2.CV_32FC1)


def load_images(paths: Sequence[Path], spec: ImageSpec) -> np.ndarray:
    """Read, check, undistort and resize images.

    Args:
        paths: n files.
        spec: stored camera, distortion, working size.
    Returns:
        (n, height, width, 3) uint8 RGB.
    Raises:
        DatasetError: the first damaged file in the order of `paths`, or one whose size is not the camera's.
    """
    maps = _undistortion_maps(spec)
    stored, (width, height) = (spec.camera.width, spec.camera.height), spec.size

    def load(path: Path) -> np.ndarray:
        image = read_image(path)
        if image.shape[1::-1] != stored:
            raise DatasetError(
                f"{path}: image is {image.shape[1]}x{image.shape[0]} but w, h say {stored[0]}x{stored[1]}; "
                "give the intrinsics of the stored images"
            )
        if maps is not None:
            image = cv2.remap(image, maps[0], maps[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        return image if stored == spec.size else cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return np.stack(list(pool.map(load, paths)))
