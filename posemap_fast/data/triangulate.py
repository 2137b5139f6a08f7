"""Sparse points from posed images: SIFT matches between neighbouring views, triangulated with the known poses.

No bundle adjustment and no tracks: the points only have to say where the content is (the automatic frame), so a
two-view point is kept when both reprojections and the parallax vouch for it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from posemap_fast.data.image_stack import ImageStack
from posemap_fast.data.sift import match_descriptors, sift_points
from posemap_fast.geometry import Camera

__all__ = ["SparsePoints", "TriangulationOptions", "choose_pairs", "triangulate_pair", "triangulate_scene"]


@dataclass(frozen=True)
class TriangulationOptions:
    """Limits of the search; pixels are those of the given images."""

    max_views: int = 120  # evenly spaced over the training views
    max_keypoints: int = 700  # per view
    partners: int = 4  # pairs per view
    max_turn_deg: float = 40.0  # between the optical axes of a pair
    min_baseline: float = 0.04  # of the diameter of the camera centres
    ratio: float = 0.8  # Lowe's test on descriptor distances
    max_error_px: float = 1.5  # reprojection, in both views
    min_parallax_deg: float = 1.5
    small_side: int = 400  # images below this width are enlarged twice before SIFT


@dataclass(frozen=True, eq=False)
class SparsePoints:
    """Triangulated points and how far each is from the nearer of its two cameras."""

    xyz: np.ndarray  # (p, 3) float64, world
    distance: np.ndarray  # (p,) world units
    n_pairs: int  # pairs of views that were matched


def choose_pairs(c2w: np.ndarray, options: TriangulationOptions) -> list[tuple[int, int]]:
    """Pairs (i, j), i < j, of views that look the same way from centres that are apart.

    Each view asks for `partners` others: half of them the nearest beyond the minimal baseline, half the nearest
    beyond three times that, so that near and far content both find enough parallax.
    """
    centres, axes = c2w[:, :3, 3], c2w[:, :3, 2]
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=-1)
    looks_along = axes @ axes.T > np.cos(np.deg2rad(options.max_turn_deg))
    np.fill_diagonal(looks_along, False)
    diameter = 2 * np.median(np.linalg.norm(centres - np.median(centres, axis=0), axis=1))
    pairs: set[tuple[int, int]] = set()
    for view in range(len(c2w)):
        for least, count in ((1.0, options.partners - options.partners // 2), (3.0, options.partners // 2)):
            allowed = looks_along[view] & (apart[view] > least * options.min_baseline * diameter)
            others = np.flatnonzero(allowed)
            nearest = others[np.argsort(apart[view][others], kind="stable")[:count]]
            pairs |= {(min(view, int(j)), max(view, int(j))) for j in nearest}
    return sorted(pairs)


def _rays(camera: Camera, c2w: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    local = np.stack(
        [(pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy, np.ones(len(pixels))], axis=1
    )
    local /= np.linalg.norm(local, axis=1, keepdims=True)
    return local @ c2w[:3, :3].T


def _reprojection(camera: Camera, c2w: np.ndarray, points: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Pixel errors (n,), infinite for points behind the camera."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    depth = np.where(local[:, 2] > 0, local[:, 2], np.nan)
    u = local[:, 0] / depth * camera.fx + camera.cx - pixels[:, 0]
    v = local[:, 1] / depth * camera.fy + camera.cy - pixels[:, 1]
    return np.nan_to_num(np.hypot(u, v), nan=np.inf)


def triangulate_pair(
    camera: Camera,
    poses: tuple[np.ndarray, np.ndarray],
    pixels: tuple[np.ndarray, np.ndarray],
    options: TriangulationOptions,
) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints of the rays of matched pixels (n, 2) in two views that pass all checks.

    Returns:
        points (m, 3) and their distance (m,) to the nearer camera; m <= n.
    """
    a, b = (_rays(camera, pose, pixel) for pose, pixel in zip(poses, pixels, strict=True))
    between = poses[1][:3, 3] - poses[0][:3, 3]
    cosine = (a * b).sum(1).clip(-1, 1)
    determinant = np.maximum(1 - cosine**2, 1e-12)
    s = (a @ between - cosine * (b @ between)) / determinant
    t = (cosine * (a @ between) - b @ between) / determinant
    points = 0.5 * (poses[0][:3, 3] + s[:, None] * a + poses[1][:3, 3] + t[:, None] * b)
    keep = (s > 0) & (t > 0) & (cosine < np.cos(np.deg2rad(options.min_parallax_deg)))
    for pose, pixel in zip(poses, pixels, strict=True):
        keep &= _reprojection(camera, pose, points, pixel) <= options.max_error_px
    return points[keep], np.minimum(s, t)[keep]


def triangulate_scene(
    images: ImageStack | np.ndarray, c2w: np.ndarray, camera: Camera, options: TriangulationOptions | None = None
) -> SparsePoints:
    """Sparse points of posed views.

    Args:
        images: (n, H, W, 3) uint8 RGB.
        c2w: (n, 4, 4) float64 OpenCV camera-to-world.
        camera: shared by the views.
    Returns:
        Points in the order of the pairs: the same on every call. A few seconds for 300 views of 160x120.
    """
    options = options or TriangulationOptions()
    chosen = np.unique(np.linspace(0, len(c2w) - 1, min(len(c2w), options.max_views)).round().astype(int))
    poses = c2w[chosen]
    pairs = choose_pairs(poses, options)

    def points_of(view: int) -> tuple[np.ndarray, np.ndarray]:
        return sift_points(np.asarray(images[int(view)]), options.max_keypoints, options.small_side)

    def one(pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        (points_a, words_a), (points_b, words_b) = features[pair[0]], features[pair[1]]
        matches = match_descriptors(words_a, words_b, options.ratio)
        pixels = points_a[matches[:, 0]], points_b[matches[:, 1]]
        return triangulate_pair(camera, (poses[pair[0]], poses[pair[1]]), pixels, options)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        features = list(pool.map(points_of, chosen))
        parts = list(pool.map(one, pairs))
    xyz = np.concatenate([np.zeros((0, 3)), *(part[0] for part in parts)])
    return SparsePoints(xyz, np.concatenate([np.zeros(0), *(part[1] for part in parts)]), len(pairs))
