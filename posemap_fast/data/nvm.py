"""Cameras of a VisualSFM model (Wu, 3DV 2013), `reconstruction.nvm`: focal length and radial distortion, no poses.

The file: "NVM_V3 ...", the number of cameras, then per camera
    file name, focal length (pixels), quaternion w x y z, centre x y z, radial distortion r, 0
and the points, which are not read. VisualSFM's r undistorts a measurement m (normalised: pixels from the image's
middle, divided by f), as saved by its bundle adjustment (multicore BA, "measurement distortion"):
    m_undistorted = m (1 + r |m|^2)
Our lens model goes the other way, so its coefficients are fitted to the inverse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from posemap_fast.data.pose_lines import check_focal, parse_numbers
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, Lens

__all__ = ["NvmCamera", "measurement_lens", "read_nvm_cameras", "stem"]

_LINE_BYTES = 4096  # of one line of a camera; a longer one is no such file
_MOST_BENT = 0.15  # |r| |m|^2 in the image's corner, 165 px there at 1920x1080: far beyond the lens of a telephone
_N_SAMPLES = 200


class NvmCamera(NamedTuple):
    """Intrinsics of one image of a VisualSFM model."""

    focal: float  # pixels of the image that was reconstructed
    radial: float  # r, see the module


def stem(name: str) -> str:
    """An image's name without its suffix: the model has `.jpg` where the data set has `.png`."""
    return name.replace("\\", "/").rpartition(".")[0] or name


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, str]]:
    """(place for errors, text) of each line with content."""
    number = 0
    while line := file.readline(_LINE_BYTES):
        number += 1
        where = f"{path}: line {number}"
        if len(line) == _LINE_BYTES:
            raise DatasetError(f"{where}: longer than {_LINE_BYTES} bytes, which no camera is; restore the file")
        if line.strip():
            yield where, line.decode("utf-8", errors="replace").strip()


def _camera(where: str, text: str) -> tuple[str, NvmCamera]:
    columns = text.rsplit(maxsplit=10)
    if len(columns) != 11:
        raise DatasetError(f"{where}: must be 'name f qw qx qy qz x y z r 0'; got {text[:60]!r}; restore the file")
    numbers = parse_numbers(where, columns[1:])
    if not math.isfinite(numbers[8]):
        raise DatasetError(f"{where}: radial distortion must be finite; got {columns[9]}; restore the file")
    return stem(columns[0]), NvmCamera(check_focal(where, numbers[0]), numbers[8])


def read_nvm_cameras(path: Path) -> dict[str, NvmCamera]:
    """Cameras of the first model of an NVM file, by the names of their images without suffix.

    Raises:
        DatasetError: unreadable or damaged, with file, line, value and mend.
    """
    if not path.is_file():
        raise DatasetError(f"{path}: does not exist or is no file; restore it")
    try:
        with path.open("rb") as file:
            lines = _lines(path, file)
            where, text = next(lines, (str(path), ""))
            if not text.startswith("NVM_V3"):
                raise DatasetError(f"{where}: must start with NVM_V3; got {text[:20]!r}; restore the file")
            where, text = next(lines, (str(path), ""))
            if not (text.isascii() and text.isdigit() and 0 < len(text) < 10):
                raise DatasetError(f"{where}: must be the number of cameras; got {text[:20]!r}; restore the file")
            cameras: dict[str, NvmCamera] = {}
            for index in range(int(text)):
                where, line = next(lines, ("", ""))
                if not where:
                    raise DatasetError(f"{path}: ends after {index} of {text} cameras; copy the file again")
                name, camera = _camera(where, line)
                cameras[name] = camera
            return cameras
    except OSError as error:
        raise DatasetError(f"{path}: cannot read: {error.strerror}; check the file") from error


def measurement_lens(camera: Camera, radial: float) -> Lens | None:
    """The lens of an image with VisualSFM's radial distortion r.

    k1, k2, k3 of the `opencv` model are the least squares fit, in pixels, of the inverse of m (1 + r |m|^2) over the
    image: at 1920x1080 within 0.01 px for |r| |m|^2 <= 0.05 in the corner, 0.13 px for 0.1, 0.8 px for 0.15. (The
    rational form would be nearer, but few other programs read its coefficients.)

    Args:
        camera: K and size of the stored image, principal point in its middle.
        radial: r, which does not depend on the image's size.
    Returns:
        None where |r| |m|^2 exceeds 0.15 in the corner: such a camera is a failure of the reconstruction.
    """
    if radial == 0:
        return Lens(camera)
    corner = math.hypot(camera.width / camera.fx, camera.height / camera.fy) / 2
    if not abs(radial) * corner**2 <= _MOST_BENT:
        return None
    distorted = np.linspace(0, corner, _N_SAMPLES + 1)[1:]
    undistorted = distorted * (1 + radial * distorted**2)
    scale = undistorted[-1]  # keeps the powers in [0, 1]
    x = undistorted / scale
    fitted = np.linalg.lstsq(np.stack([x**3, x**5, x**7], axis=1), distorted / scale - x, rcond=None)[0]
    k1, k2, k3 = (float(a / scale ** (2 * n)) for n, a in enumerate(fitted, start=1))
    return Lens(camera, "opencv", (k1, k2, 0.0, 0.0, k3))
