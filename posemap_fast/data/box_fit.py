"""Fitting the field's box to cameras and sparse points: orientation, robust extent, number of cascades."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["BoxFit", "BoxOptions", "fit_box", "up_direction", "wild_cameras"]


@dataclass(frozen=True)
class BoxOptions:
    """Constants of the fit; shares are of the points, lengths of the box's longest side."""

    percentile: float = 0.5  # tail cut off on each side of each axis
    core_percentile: float = 10.0  # the same for the inner box
    min_share: float = 0.99  # of the points inside
    margin: float = 0.05  # added on each side
    max_cascades: int = 4
    yaw_step_deg: float = 4.0
    min_saving: float = 0.15  # of the volume, for a turned box to replace the axis-aligned one
    wild_factor: float = 30.0  # times the median distance from the median centre


@dataclass(frozen=True, eq=False)
class BoxFit:
    """A cube for the field and the tight box of the content inside it, both in axes `rotation` @ world."""

    rotation: np.ndarray  # (3, 3)
    centre: np.ndarray  # (3,) of the cube
    half: float  # of the cube's side, world units
    low: np.ndarray  # (3,) content box
    high: np.ndarray
    n_cascades: int
    share_inside: float  # of the points


def wild_cameras(centres: np.ndarray, factor: float) -> np.ndarray:
    """Mask of camera centres (n, 3) that lie absurdly far from the others (damaged poses)."""
    away = np.linalg.norm(centres - np.median(centres, axis=0), axis=1)
    typical = np.median(away)
    return away > factor * typical if typical > 0 else np.zeros(len(centres), bool)


def up_direction(c2w: np.ndarray) -> np.ndarray:
    """World up (3,) of cameras held level: near the mean image-up, at right angles to the cameras' x axes.

    u ~ (mean(x x^T) + 0.02 I)^-1 mean(-y); for cameras that all face one way the mean image-up decides.
    """
    right, up = c2w[:, :3, 0], -c2w[:, :3, 1].mean(0)
    level = np.linalg.solve(right.T @ right / len(right) + 0.02 * np.eye(3), up)
    length = np.linalg.norm(level)
    return level / length if length > 1e-9 else np.array([0.0, 0.0, 1.0])


def _turned_axes(up: np.ndarray, yaw: float) -> np.ndarray:
    """Rotation whose third row is `up` and whose first row is turned by `yaw` around it."""
    start = np.eye(3)[np.abs(up).argmin()]
    first = np.cross(up, start)
    first /= np.linalg.norm(first)
    second = np.cross(up, first)
    x = math.cos(yaw) * first + math.sin(yaw) * second
    return np.stack([x, np.cross(up, x), up])


def _tight_box(
    points: np.ndarray, centres: np.ndarray, percentile: float, margin: float
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile box of the points united with the box of the cameras, both grown by the margin."""
    low, high = np.percentile(points, percentile, axis=0), np.percentile(points, 100 - percentile, axis=0)
    low, high = np.minimum(low, centres.min(0)), np.maximum(high, centres.max(0))
    longest = float((high - low).max())
    grow = margin * (longest if longest > 0 else 1.0)
    return low - grow, high + grow


def _choose_rotation(points: np.ndarray, centres: np.ndarray, up: np.ndarray, options: BoxOptions) -> np.ndarray:
    """Axes of the smallest box: the world's own unless turning about `up` saves `min_saving` of the volume."""

    def volume(rotation: np.ndarray) -> float:
        low, high = _tight_box(points @ rotation.T, centres @ rotation.T, options.percentile, 0.0)
        return float(np.prod(high - low))

    yaws = np.deg2rad(np.arange(0, 90, options.yaw_step_deg))
    best = min((_turned_axes(up, yaw) for yaw in yaws), key=volume)
    own = np.eye(3)
    return best if volume(best) < (1 - options.min_saving) * volume(own) else own


def _cube(
    points: np.ndarray, centres: np.ndarray, low: np.ndarray, high: np.ndarray, options: BoxOptions
) -> tuple[np.ndarray, float, int]:
    """Cube centre, half side and cascades for a content box in the final axes."""
    core_low, core_high = _tight_box(points, centres, options.core_percentile, options.margin)
    core_centre = (core_low + core_high) / 2
    core_half = float((core_high - core_low).max()) / 2
    full_half = float(np.maximum(high - core_centre, core_centre - low).max())
    doublings = min(options.max_cascades - 1, math.floor(math.log2(max(1.0, full_half / core_half))))
    if doublings == 0:
        return (low + high) / 2, float((high - low).max()) / 2, 1
    return core_centre, min(full_half, core_half * 2**doublings * 2), doublings + 1


def fit_box(points: np.ndarray, c2w: np.ndarray, options: BoxOptions | None = None) -> BoxFit:
    """Cube of the field for points (p, 3) and camera poses (n, 4, 4) without wild ones.

    The content box cuts `percentile` of the points off each side, less when fewer than `min_share` stay inside, and
    contains all cameras. One cascade when the content is at most twice as large as the inner box around cameras and
    the middle 80 % of the points; otherwise the cube is centred on the inner box and every further cascade halves it.
    """
    options = options or BoxOptions()
    centres = c2w[:, :3, 3]
    rotation = _choose_rotation(points, centres, up_direction(c2w), options)
    turned, cameras = points @ rotation.T, centres @ rotation.T
    for percentile in np.linspace(options.percentile, 0.0, 11):
        low, high = _tight_box(turned, cameras, percentile, options.margin)
        if np.mean(((turned >= low) & (turned <= high)).all(1)) >= options.min_share:
            break
    centre, half, n_cascades = _cube(turned, cameras, low, high, options)
    low, high = np.maximum(low, centre - half), np.minimum(high, centre + half)
    share = float(np.mean(((turned >= low) & (turned <= high)).all(1)))
    return BoxFit(rotation, centre, half, low, high, n_cascades, share)
