"""SIFT points of an image and their matches in another: what triangulation and the check of the poses share.

Positions are pixels from the image's corner (centres at +0.5). OpenCV's SIFT is deterministic, and so is this.
"""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["match_descriptors", "sift_points"]


def sift_points(image: np.ndarray, max_points: int, small_side: int) -> tuple[np.ndarray, np.ndarray]:
    """SIFT of one image; RootSIFT descriptors (Arandjelovic and Zisserman, CVPR 2012).

    Args:
        image: (H, W, 3) uint8 RGB.
        max_points: the strongest are kept.
        small_side: an image whose longer side is below this is enlarged twice first; positions are of the given one.
    Returns:
        image points (k, 2) float64 and descriptors (k, 128) float32.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    factor = 2 if max(grey.shape) < small_side else 1
    if factor == 2:
        grey = cv2.resize(grey, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found, descriptors = cv2.SIFT.create(nfeatures=max_points).detectAndCompute(grey, None)
    if descriptors is None:
        return np.zeros((0, 2)), np.zeros((0, 128), np.float32)
    points = (np.array([keypoint.pt for keypoint in found], np.float64).reshape(-1, 2) + 0.5) / factor
    descriptors = np.sqrt(descriptors / np.maximum(descriptors.sum(1, keepdims=True), 1e-9))
    return points, descriptors.astype(np.float32)


def match_descriptors(a: np.ndarray, b: np.ndarray, ratio: float) -> np.ndarray:
    """Mutually nearest descriptors that pass Lowe's ratio test: (k, 128), (l, 128) -> (m, 2) indices."""
    if len(a) < 2 or len(b) < 2:
        return np.zeros((0, 2), np.int64)
    matches = cv2.BFMatcher(cv2.NORM_L2).knnMatch(a, b, k=2)
    best = np.array([(m.trainIdx, m.distance, n.distance) for m, n in matches])
    back = np.full(len(b), -1)
    order = np.argsort(-best[:, 1], kind="stable")  # the closest one is written last and stays
    back[best[order, 0].astype(int)] = order
    forward = best[:, 0].astype(int)
    keep = (best[:, 1] < ratio * best[:, 2]) & (back[forward] == np.arange(len(a)))
    return np.stack([np.flatnonzero(keep), forward[keep]], axis=1)
