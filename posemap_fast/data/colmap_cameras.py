"""COLMAP's camera models as lenses and back, and the records that its text and its binary files both hold.

Convention: pixels from the image's corner (centres at +0.5), as COLMAP counts them. The extra parameters of each
COLMAP model are the first coefficients of our lens model, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens

__all__ = ["CAMERA_MODELS", "LARGEST", "CameraModel", "CameraRecord", "ImageRecord", "lens_of", "parameters_of"]

LARGEST = 1e30  # numbers of this size and more are damage; below, float32 holds them
_LARGEST_SIDE = 1 << 16  # pixels
_MEND = "export the model again"


class CameraRecord(NamedTuple):
    """One camera as a file holds it."""

    where: str  # file and line or byte, to be named in errors
    camera_id: int
    model: str
    width: int
    height: int
    parameters: tuple[float, ...]


class ImageRecord(NamedTuple):
    """One registered image as a file holds it."""

    where: str
    image_id: int
    pose: tuple[float, ...]  # world-to-camera: quaternion w, x, y, z and translation
    camera_id: int
    name: str


@dataclass(frozen=True)
class CameraModel:
    """How the parameters of a COLMAP camera model are to be read: focal length(s), principal point, extra ones."""

    number: int  # in binary files
    n_focal: int  # 1: f, 2: fx fy
    n_extra: int
    lens: str  # name in LENSES
    n_coefficients: int  # of the lens; the extra parameters padded with zeros

    @property
    def n_parameters(self) -> int:
        """Numbers in a file."""
        return self.n_focal + 2 + self.n_extra


CAMERA_MODELS = {
    "SIMPLE_PINHOLE": CameraModel(0, 1, 0, "pinhole", 0),
    "PINHOLE": CameraModel(1, 2, 0, "pinhole", 0),
    "SIMPLE_RADIAL": CameraModel(2, 1, 1, "opencv", 4),
    "RADIAL": CameraModel(3, 1, 2, "opencv", 4),
    "OPENCV": CameraModel(4, 2, 4, "opencv", 4),
    "OPENCV_FISHEYE": CameraModel(5, 2, 4, "fisheye", 4),
    "FULL_OPENCV": CameraModel(6, 2, 8, "opencv", 8),
    "FOV": CameraModel(7, 2, 1, "fov", 1),
    "SIMPLE_RADIAL_FISHEYE": CameraModel(8, 1, 1, "fisheye", 4),
    "RADIAL_FISHEYE": CameraModel(9, 1, 2, "fisheye", 4),
    "THIN_PRISM_FISHEYE": CameraModel(10, 2, 8, "thin_prism_fisheye", 8),
    "RAD_TAN_THIN_PRISM_FISHEYE": CameraModel(11, 2, 12, "rad_tan_thin_prism_fisheye", 12),
    "SIMPLE_DIVISION": CameraModel(12, 1, 1, "division", 1),
    "DIVISION": CameraModel(13, 2, 1, "division", 1),
    "SIMPLE_FISHEYE": CameraModel(14, 1, 0, "fisheye", 4),
    "FISHEYE": CameraModel(15, 2, 0, "fisheye", 4),
    "EUCM": CameraModel(16, 2, 2, "eucm", 2),
}


def _check_numbers(record: CameraRecord, n_parameters: int) -> None:
    """Raise `DatasetError` for a size or parameters that no camera has."""
    sides = (record.width, record.height)
    if not all(0 < side <= _LARGEST_SIDE for side in sides):
        raise DatasetError(
            f"{record.where}: WIDTH HEIGHT: must lie between 1 and {_LARGEST_SIDE}; got {sides[0]} {sides[1]}; {_MEND}"
        )
    if len(record.parameters) != n_parameters:
        raise DatasetError(
            f"{record.where}: PARAMS: {record.model} has {n_parameters}; got {len(record.parameters)}; {_MEND}"
        )
    bad = next((value for value in record.parameters if not abs(value) < LARGEST), None)
    if bad is not None:
        raise DatasetError(f"{record.where}: PARAMS: must be finite numbers below {LARGEST:g}; got {bad}; {_MEND}")


def lens_of(record: CameraRecord) -> Lens:
    """The lens of a camera.

    Raises:
        DatasetError: unknown model, wrong number of parameters, or values that no camera has.
    """
    model = CAMERA_MODELS.get(record.model)
    if model is None:
        raise DatasetError(
            f"{record.where}: MODEL: {record.model[:40]!r} is not supported (known: {', '.join(CAMERA_MODELS)}); "
            "undistort the images with COLMAP's image_undistorter, or cut panoramas into perspective images"
        )
    _check_numbers(record, model.n_parameters)
    focal, rest = record.parameters[: model.n_focal], record.parameters[model.n_focal :]
    extra = rest[2:]
    try:
        camera = Camera(record.width, record.height, focal[0], focal[-1], *rest[:2])
    except ConfigError as error:
        raise DatasetError(f"{record.where}: PARAMS: {error}; {_MEND}") from error
    lens = Lens(camera, model.lens, extra + (0.0,) * (model.n_coefficients - len(extra)))
    return Lens(camera) if lens.is_pinhole else lens


def parameters_of(lens: Lens) -> tuple[str, tuple[float, ...]]:
    """Name and parameters of the COLMAP model that says the same as a lens; `lens_of` reverses it.

    Raises:
        DatasetError: COLMAP has no such model.
    """
    camera, coefficients = lens.camera, lens.coefficients
    k = (camera.fx, camera.fy, camera.cx, camera.cy)
    if lens.is_pinhole:
        return "PINHOLE", k
    if lens.model == "opencv":
        needed = 4 if not any(coefficients[4:]) else 8
        padded = (coefficients + (0.0,) * 8)[:needed]
        return ("OPENCV" if needed == 4 else "FULL_OPENCV"), k + padded
    for name, model in CAMERA_MODELS.items():
        if model.lens == lens.model and model.n_focal == 2 and model.n_extra == len(coefficients):
            return name, k + coefficients
    raise DatasetError(f"lens model {lens.model}: COLMAP has no such camera; undistort the images first")
