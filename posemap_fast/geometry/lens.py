"""Lenses: where a direction in camera axes falls on a distorted image, and the pinhole image made of it.

Convention: OpenCV camera axes; pixel positions from the image's corner (centres at +0.5), as in `Camera`. A point
(x, y, z) before the camera has the normalised position (x / z, y / z), which the lens bends and K maps to pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from posemap_fast.errors import ConfigError
from posemap_fast.geometry.cameras import Camera
from posemap_fast.registry import Registry

__all__ = ["LENSES", "Lens", "LensModel"]

Bend = Callable[[np.ndarray, Sequence[float]], np.ndarray]


@dataclass(frozen=True)
class LensModel:
    """`bend(xy, coefficients)` maps undistorted to distorted normalised positions, both (n, 2) float64."""

    n_coefficients: tuple[int, ...]  # the numbers of coefficients it takes
    bend: Bend


LENSES: Registry[LensModel] = Registry("lens model")


@dataclass(frozen=True)
class Lens:
    """A camera with its lens.

    Raises:
        ConfigError: unknown model, wrong number of coefficients, or one that is not finite.
    """

    camera: Camera  # K and size of the stored image
    model: str = "pinhole"  # a name in LENSES
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        counts = LENSES.get(self.model).n_coefficients
        if len(self.coefficients) not in counts:
            raise ConfigError(
                f"lens {self.model}: takes {' or '.join(map(str, counts))} coefficients; got {len(self.coefficients)}"
            )
        if not all(math.isfinite(c) for c in self.coefficients):
            raise ConfigError(f"lens {self.model}: coefficients must be finite; got {self.coefficients}")

    @property
    def is_pinhole(self) -> bool:
        """Whether nothing is bent."""
        return self.model == "pinhole" or (self.model == "opencv" and not any(self.coefficients))

    def pixels(self, xy: np.ndarray) -> np.ndarray:
        """Normalised positions (n, 2) -> pixel positions (n, 2) on the stored image."""
        camera = self.camera
        bent = xy if self.is_pinhole else LENSES.get(self.model).bend(xy, self.coefficients)
        return bent * [camera.fx, camera.fy] + [camera.cx, camera.cy]

    def sampling_map(self, target: Camera) -> np.ndarray:
        """(height, width, 2) float32: where on the stored image each pixel centre of `target`'s image lies.

        As `cv2.remap` wants it: pixel centres of the stored image at whole numbers.
        """
        grid = target.pixel_grid().double().numpy()
        xy = (grid - [target.cx, target.cy]) / [target.fx, target.fy]
        return (self.pixels(xy) - 0.5).astype(np.float32).reshape(target.height, target.width, 2)


def _opencv(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """OpenCV's k1 k2 p1 p2 [k3 [k4 k5 k6]]: radial (rational) and tangential."""
    k1, k2, p1, p2, k3, k4, k5, k6 = (*c, *(0.0,) * (8 - len(c)))
    x, y = xy[:, 0], xy[:, 1]
    r2 = x * x + y * y
    radial = (1 + r2 * (k1 + r2 * (k2 + r2 * k3))) / (1 + r2 * (k4 + r2 * (k5 + r2 * k6)))
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
            y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
        ],
        axis=1,
    )


def _fisheye(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """Equidistant (Kannala and Brandt 2006), OpenCV's fisheye: theta_d = theta (1 + k1 theta^2 + ... + k4 theta^8)."""
    k1, k2, k3, k4 = (*c, *(0.0,) * (4 - len(c)))
    radius = np.hypot(xy[:, 0], xy[:, 1])
    theta = np.arctan(radius)
    t2 = theta * theta
    bent = theta * (1 + t2 * (k1 + t2 * (k2 + t2 * (k3 + t2 * k4))))
    return xy * (bent / np.maximum(radius, 1e-12))[:, None]


def _fov(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """Devernay and Faugeras 2001, COLMAP's FOV: r_d = atan(2 r tan(omega / 2)) / omega."""
    (omega,) = c
    radius = np.hypot(xy[:, 0], xy[:, 1])
    if abs(omega) < 1e-6:
        return xy
    bent = np.arctan(2 * radius * math.tan(omega / 2)) / omega
    return xy * (bent / np.maximum(radius, 1e-12))[:, None]


LENSES.register("pinhole")(LensModel((0,), lambda xy, _: xy))
LENSES.register("opencv")(LensModel((4, 5, 8), _opencv))
LENSES.register("fisheye")(LensModel((4,), _fisheye))
LENSES.register("fov")(LensModel((1,), _fov))
