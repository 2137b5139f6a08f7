"""Lens models that only COLMAP has: fisheyes with tangential and prism terms, the division model, EUCM.

Convention as in `lens`: undistorted normalised positions (n, 2) in, distorted ones out. Where a model does not see a
direction the result is NaN. The formulas and the order of the coefficients are those of COLMAP's camera models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posemap_fast.geometry.lens import LENSES, LensModel

__all__: list[str] = []


def _equidistant(xy: np.ndarray) -> np.ndarray:
    """The ideal fisheye: theta_d = theta."""
    radius = np.hypot(xy[:, 0], xy[:, 1])
    return xy * (np.arctan(radius) / np.maximum(radius, 1e-12))[:, None]


def _tangential(x: np.ndarray, y: np.ndarray, p: float, q: float) -> tuple[np.ndarray, np.ndarray]:
    """Decentring: p bends along x, q along y."""
    r2 = x * x + y * y
    return 2 * q * x * y + p * (r2 + 2 * x * x), 2 * p * x * y + q * (r2 + 2 * y * y)


def _thin_prism_fisheye(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """k1 k2 p1 p2 k3 k4 sx1 sy1 (Weng et al. 1992), on the positions of the ideal fisheye."""
    k1, k2, p1, p2, k3, k4, sx1, sy1 = c
    x, y = _equidistant(xy).T
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * (k3 + r2 * k4)))
    dx, dy = _tangential(x, y, p2, p1)
    return np.stack([x * radial + dx + sx1 * r2, y * radial + dy + sy1 * r2], axis=1)


def _rad_tan_thin_prism_fisheye(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """k0..k5 p0 p1 s0..s3, Project Aria's Fisheye624: tangential and prism terms follow the radial ones."""
    k, (p0, p1, s0, s1, s2, s3) = c[:6], c[6:]
    ideal = _equidistant(xy)
    t2 = (ideal * ideal).sum(axis=1)
    x, y = (ideal * (1 + sum(kn * t2 ** (n + 1) for n, kn in enumerate(k)))[:, None]).T
    r2 = x * x + y * y
    dx, dy = _tangential(x, y, p0, p1)
    return np.stack([x + dx + r2 * (s0 + r2 * s1), y + dy + r2 * (s2 + r2 * s3)], axis=1)


def _division(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """Fitzgibbon 2001: undistorted = distorted / (1 + k r_d^2), solved for the distorted position."""
    discriminant = 1 - 4 * c[0] * (xy * xy).sum(axis=1)
    root = np.sqrt(np.where(discriminant >= 0, discriminant, np.nan))
    return xy * (2 / (1 + root))[:, None]


def _eucm(xy: np.ndarray, c: Sequence[float]) -> np.ndarray:
    """Enhanced unified camera model (Khomutenko et al. 2016), coefficients alpha beta."""
    alpha, beta = c
    squared = 1 + beta * (xy * xy).sum(axis=1)
    depth = alpha * np.sqrt(np.where(squared >= 0, squared, np.nan)) + 1 - alpha
    return xy / np.where(depth > 0, depth, np.nan)[:, None]


LENSES.register("thin_prism_fisheye")(LensModel((8,), _thin_prism_fisheye))
LENSES.register("rad_tan_thin_prism_fisheye")(LensModel((12,), _rad_tan_thin_prism_fisheye))
LENSES.register("division")(LensModel((1,), _division))
LENSES.register("eucm")(LensModel((2,), _eucm))
