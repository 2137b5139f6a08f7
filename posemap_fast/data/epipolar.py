"""Do the poses fit the images? Epipolar distances of SIFT matches, for the poses as loaded and for other readings.

For a match (u_a, u_b) of two views with calibrated directions x = K^-1 (u, v, 1) and relative pose X_b = R X_a + t

    x_b^T [t]_x R x_a = 0

holds whatever the scene is (Longuet-Higgins 1981), so that a wrong axis, inverse or focal length shows as pixels
between a point and its partner's epipolar line. Nothing here changes a pose: it measures, and says what it found.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import cv2
import numpy as np

from posemap_fast.data.pose_readings import readings
from posemap_fast.data.sift import match_descriptors, sift_points
from posemap_fast.data.triangulate import TriangulationOptions, choose_pairs
from posemap_fast.geometry import Camera

__all__ = ["GOOD", "EpipolarOptions", "Fit", "PoseCheck", "check_poses", "epipolar_distances"]

GOOD = "poses and calibration fit the images"  # the verdict when there is nothing to add


@dataclass(frozen=True)
class EpipolarOptions:
    """Constants of the check; shares of the image are of its width."""

    n_pairs: int = 12
    max_points: int = 1500  # SIFT points per image
    max_side: int = 1280  # px; larger images are reduced for the matching
    ratio: float = 0.8  # Lowe's test
    min_matches: int = 40  # of a pair
    min_shift: float = 0.03  # median motion of the matches; less says little about the poses
    gaps: tuple[int, ...] = (1, 3, 9, 27)  # between views taken as neighbours in the sequence
    good: float = 2.5 / 640  # median distance of poses that fit
    poor: float = 8.0 / 640  # median distance above which nothing fits
    least_px: float = 0.75  # what SIFT itself leaves in tiny images; never judged below
    focal_range: tuple[float, float] = (0.8, 1.25)
    focal_step: float = 1.01


@dataclass(frozen=True)
class Fit:
    """How well one reading of the poses explains the matches."""

    reading: str
    error_px: float  # median symmetric epipolar distance, px of the stored images
    in_front: float  # share of the matches whose point lies before both cameras


@dataclass(frozen=True)
class PoseCheck:
    """What the images say about poses and calibration."""

    verdict: str  # one sentence
    fits: bool | None  # None: too few matches to judge
    n_pairs: int = 0
    n_matches: int = 0
    image_width: float = 0.0  # px, median of the views used: 640 / image_width brings errors to a width of 640
    loaded: Fit | None = None
    best_alternative: Fit | None = None
    alternatives: tuple[Fit, ...] = field(default=(), repr=False)  # all others, best first
    focal_factor: float = 1.0  # on fx and fy, the best for the better of the two readings
    focal_error_px: float = math.inf  # with that factor

    def to_dict(self, n_alternatives: int = 3) -> dict[str, Any]:
        """Plain numbers for JSON, with the best few alternatives."""
        return asdict(self) | {"alternatives": [asdict(fit) for fit in self.alternatives[:n_alternatives]]}


@dataclass(frozen=True, eq=False)
class _Pair:
    """Matched points of two views."""

    views: tuple[int, int]
    cameras: tuple[Camera, Camera]
    pixels: tuple[np.ndarray, np.ndarray]  # (m, 2) each

    @property
    def shift(self) -> float:
        """Median motion of the matches as a share of the image width."""
        scaled = [pixels / camera.width for pixels, camera in zip(self.pixels, self.cameras, strict=True)]
        return float(np.median(np.linalg.norm(scaled[1] - scaled[0], axis=1)))


def _directions(camera: Camera, pixels: np.ndarray, focal_factor: float) -> np.ndarray:
    xy = (pixels - [camera.cx, camera.cy]) / [camera.fx * focal_factor, camera.fy * focal_factor]
    return np.column_stack([xy, np.ones(len(xy))])


def epipolar_distances(
    cameras: tuple[Camera, Camera],
    poses: tuple[np.ndarray, np.ndarray],
    pixels: tuple[np.ndarray, np.ndarray],
    focal_factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the two distances between a point and its partner's epipolar line, for each match.

    Args:
        cameras: of the two views.
        poses: (4, 4) camera-to-world each; a reflection instead of a rotation is allowed.
        pixels: matched positions, (m, 2) each, from the image's corner.
        focal_factor: multiplies the focal lengths of both cameras.
    Returns:
        distances (m,) in pixels, infinite for poses without baseline; mask (m,) of points before both cameras.
    """
    a, b = (_directions(camera, p, focal_factor) for camera, p in zip(cameras, pixels, strict=True))
    back = poses[1][:3, :3].T
    rotation, translation = back @ poses[0][:3, :3], back @ (poses[0][:3, 3] - poses[1][:3, 3])
    length = float(np.linalg.norm(translation))
    if not 1e-12 < length < math.inf:
        return np.full(len(a), np.inf), np.zeros(len(a), bool)
    translation = translation / length
    turned = a @ rotation.T
    line_b = np.cross(translation, turned)  # in calibrated coordinates, as is `line_a`
    line_a = -np.cross(translation, b) @ rotation
    off = np.abs((b * line_b).sum(1))
    slopes = [
        np.hypot(line[:, 0] / camera.fx, line[:, 1] / camera.fy) / focal_factor
        for line, camera in zip((line_a, line_b), cameras, strict=True)
    ]
    distance = sum(off / np.maximum(slope, 1e-15) for slope in slopes) / 2
    normal = np.cross(turned, b)  # signs of the depths z_a, z_b that solve z_b b - z_a turned = translation
    z_a = (np.cross(b, translation) * normal).sum(1)
    z_b = (np.cross(turned, translation) * normal).sum(1)
    return np.asarray(distance), (z_a > 0) & (z_b > 0)


class _Matcher:
    """Points and matches of views, each image read once."""

    def __init__(self, cameras: Sequence[Camera], read: Callable[[int], np.ndarray], options: EpipolarOptions):
        self._cameras, self._read, self._options = cameras, read, options
        self._points: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _of(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        if view not in self._points:
            image = self._read(view)
            scale = max(1.0, max(image.shape[:2]) / self._options.max_side)
            size = (round(image.shape[1] / scale), round(image.shape[0] / scale))
            small = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
            points, words = sift_points(small, self._options.max_points, TriangulationOptions.small_side)
            points = points * [image.shape[1] / size[0], image.shape[0] / size[1]]
            self._points[view] = points, words
        return self._points[view]

    def pair(self, views: tuple[int, int]) -> _Pair | None:
        """The matches of two views; None when they are too few."""
        (points_a, words_a), (points_b, words_b) = (self._of(view) for view in views)
        found = match_descriptors(words_a, words_b, self._options.ratio)
        if len(found) < self._options.min_matches:
            return None
        cameras = self._cameras[views[0]], self._cameras[views[1]]
        return _Pair(views, cameras, (points_a[found[:, 0]], points_b[found[:, 1]]))


def _spread(count: int, n_chosen: int) -> list[int]:
    """At most `n_chosen` indices below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, n_chosen)).round().astype(int)).tolist()


def _posed_pairs(c2w: np.ndarray, matcher: _Matcher, options: EpipolarOptions) -> Iterator[_Pair]:
    """Pairs that overlap and have a baseline according to the poses."""
    views = _spread(len(c2w), TriangulationOptions.max_views)
    pairs = choose_pairs(c2w[views], TriangulationOptions())
    for index in _spread(len(pairs), 2 * options.n_pairs):
        pair = matcher.pair((views[pairs[index][0]], views[pairs[index][1]]))
        if pair is not None and pair.shift >= options.min_shift:
            yield pair


def _neighbour_pairs(n_views: int, matcher: _Matcher, options: EpipolarOptions) -> Iterator[_Pair]:
    """Pairs near to each other in the sequence, whatever the poses say: the first gap with enough motion."""
    for start in _spread(n_views, options.n_pairs):
        for gap in options.gaps:
            other = start + gap if start + gap < n_views else start - gap
            pair = matcher.pair((start, other)) if other >= 0 else None
            if pair is None:
                break
            if pair.shift >= options.min_shift:
                yield pair
                break


def _choose(c2w: np.ndarray, matcher: _Matcher, options: EpipolarOptions) -> list[_Pair]:
    """Half of the pairs by the poses, half by the sequence; either fills up what the other lacks."""
    sources = _posed_pairs(c2w, matcher, options), _neighbour_pairs(len(c2w), matcher, options)
    chosen: dict[tuple[int, int], _Pair] = {}
    for source, limit in zip((*sources, sources[0]), (options.n_pairs // 2, *(options.n_pairs,) * 2), strict=True):
        while len(chosen) < limit and (pair := next(source, None)) is not None:
            chosen[min(pair.views), max(pair.views)] = pair
    return list(chosen.values())


def _fit(reading: str, c2w: np.ndarray, pairs: Sequence[_Pair], focal_factor: float = 1.0) -> Fit:
    parts = [
        epipolar_distances(pair.cameras, (c2w[pair.views[0]], c2w[pair.views[1]]), pair.pixels, focal_factor)
        for pair in pairs
    ]
    distance, in_front = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Fit(reading, float(np.median(distance)), float(np.mean(in_front)))


def _best_focal(c2w: np.ndarray, pairs: Sequence[_Pair], options: EpipolarOptions) -> tuple[float, float]:
    """The factor on the focal lengths with the smallest median distance, and that distance."""
    low, high = (round(math.log(limit, options.focal_step)) for limit in options.focal_range)
    factors = [options.focal_step**power for power in range(low, high + 1)]
    errors = [_fit("", c2w, pairs, factor).error_px for factor in factors]
    best = int(np.argmin(errors))
    return factors[best], errors[best]


def _verdict(
    loaded: Fit, other: Fit, focal: tuple[float, float], width: float, options: EpipolarOptions
) -> tuple[bool, str]:
    """Whether the loaded poses fit, and the sentence that says so."""
    good, poor = (max(options.least_px, share * width) for share in (options.good, options.poor))
    factor, error = focal
    hint = ""
    if abs(math.log(factor)) > math.log(1.03) and error < 0.7 * min(loaded.error_px, other.error_px):
        hint = f"; focal lengths x {factor:.2f} fit better ({error:.2f} px): check the calibration"
    is_before = loaded.in_front > 0.5
    if is_before and loaded.error_px <= good and other.error_px > 0.5 * loaded.error_px:
        return True, GOOD + hint
    if other.error_px <= poor and (not is_before or other.error_px < 0.5 * loaded.error_px):
        return False, (
            f"poses fit better when {other.reading} ({other.error_px:.2f} px instead of {loaded.error_px:.2f} px): "
            f"the convention is probably that one{hint}"
        )
    if is_before and loaded.error_px <= poor:
        return True, f"{GOOD}, but only roughly{hint}"
    return False, "no reading fits: calibration or poses are wrong" + hint


def check_poses(
    c2w: np.ndarray,
    cameras: Sequence[Camera],
    read: Callable[[int], np.ndarray],
    options: EpipolarOptions | None = None,
) -> PoseCheck:
    """Measure poses and calibration against the images of a few pairs of views.

    Args:
        c2w: (n, 4, 4) float64 OpenCV camera-to-world as loaded, in the order of the sequence.
        cameras: n pinhole cameras of the images.
        read: view -> (H, W, 3) uint8 RGB image of its camera; called for about 30 of the views.
        options: constants.
    Returns:
        The same on every call: no random number is drawn. A few seconds for images of 640x480.
    """
    options = options or EpipolarOptions()
    pairs = _choose(c2w, _Matcher(cameras, read, options), options) if len(c2w) > 1 else []
    if not pairs:
        return PoseCheck("poses not judged: no two views have enough matches with enough motion between them", None)
    fits = [_fit(name, poses, pairs) for name, poses in readings(c2w)]
    loaded = fits[0]
    if math.isinf(loaded.error_px):
        return PoseCheck("poses not judged: the camera centres coincide, so that there is no epipolar geometry", None)
    others = sorted(fits[1:], key=lambda fit: (fit.in_front <= 0.5, fit.error_px))
    width = float(np.median([camera.width for pair in pairs for camera in pair.cameras]))
    better = min(loaded, others[0], key=lambda fit: fit.error_px if fit.in_front > 0.5 else math.inf)
    factor, error = _best_focal(dict(readings(c2w))[better.reading], pairs, options)
    is_fit, verdict = _verdict(loaded, others[0], (factor, error), width, options)
    n_matches = sum(len(pair.pixels[0]) for pair in pairs)
    return PoseCheck(verdict, is_fit, len(pairs), n_matches, width, loaded, others[0], tuple(others), factor, error)
