"""Checks of a dataset's images: damaged, doubled, nearly the same, blurred, black or blown out.

Every image is read once and only a few numbers of it are kept. What counts as blurred is relative to the dataset's
own median, because sharpness depends on the scene as much as on the camera.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from posemap_fast.data.sanity import N_NAMED
from posemap_fast.errors import DatasetError
from posemap_fast.progress import ProgressMeter, make_progress

__all__ = ["ImageFacts", "describe_images", "measure_images"]

_SIDE = 640  # px; sharpness is measured on images reduced to this longer side
_THUMBNAIL = (16, 12)  # width, height of the descriptor
_NEAR = 0.75  # grey levels; RMS difference of the thumbnails of images that are nearly the same
_FLAT = 2.0  # grey levels; a thumbnail with less contrast says nothing about sameness
_BLURRED = 0.2  # of the median sharpness
_BLACK, _BLOWN = 10.0, 0.5  # mean grey level; share of the pixels at 250 or more
_CHUNK = 256  # thumbnails compared with all others at a time


@dataclass(frozen=True, eq=False)
class ImageFacts:
    """What is kept of n images; the rows of damaged ones are NaN."""

    digests: list[bytes]  # SHA-256 of the file; empty for a damaged one
    damaged: dict[int, str]  # view -> what is wrong
    brightness: np.ndarray  # (n,) mean grey level
    blown: np.ndarray  # (n,) share of the pixels at 250 or more
    sharpness: np.ndarray  # (n,) variance of the Laplacian
    thumbnails: np.ndarray  # (n, 192) float32 grey levels


def _numbers(image: np.ndarray) -> np.ndarray:
    """Brightness, blown share, sharpness and thumbnail of one (H, W, 3) uint8 RGB image: (195,)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    scale = _SIDE / max(grey.shape)
    if scale < 1:
        size = (max(1, round(grey.shape[1] * scale)), max(1, round(grey.shape[0] * scale)))
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    thumbnail = cv2.resize(grey.astype(np.float32), _THUMBNAIL, interpolation=cv2.INTER_AREA)
    sharpness = cv2.Laplacian(grey, cv2.CV_32F).var()
    return np.concatenate([[grey.mean(), (grey >= 250).mean(), sharpness], thumbnail.ravel()]).astype(np.float32)


def measure_images(
    count: int,
    content: Callable[[int], bytes],
    read: Callable[[int], np.ndarray],
    meter: ProgressMeter | None = None,
) -> ImageFacts:
    """Read every image once.

    Args:
        count: number of views.
        content: view -> bytes of its file; a DatasetError marks the view as damaged, and so for `read`.
        read: view -> (H, W, 3) uint8 RGB.
        meter: shows the work; None = a bar of its own for many images.
    """

    def one(view: int) -> tuple[bytes, str, np.ndarray]:
        try:
            return hashlib.sha256(content(view)).digest(), "", _numbers(read(view))
        except DatasetError as error:
            return b"", str(error), np.full(3 + _THUMBNAIL[0] * _THUMBNAIL[1], np.nan, np.float32)

    meter = meter or make_progress(quiet=count < 500)
    found = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, meter.task("images", total=count) as task:
        for number, facts in enumerate(pool.map(one, range(count)), start=1):
            found.append(facts)
            task.update(number)
    numbers = np.stack([row for _, _, row in found])
    damaged = {view: problem for view, (_, problem, _) in enumerate(found) if problem}
    return ImageFacts(
        [digest for digest, _, _ in found], damaged, numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3:]
    )


def _identical(facts: ImageFacts) -> list[list[int]]:
    """Groups of views whose files have the same bytes."""
    groups: dict[bytes, list[int]] = {}
    for view, digest in enumerate(facts.digests):
        if digest:
            groups.setdefault(digest, []).append(view)
    return [views for views in groups.values() if len(views) > 1]


@dataclass(eq=False)
class _NearPairs:
    """Pairs of views that look the same but are different files: counts, and the first few."""

    n: int = 0
    n_leaks: int = 0  # one of train, one of test
    first: list[tuple[int, int]] = field(default_factory=list)
    first_leaks: list[tuple[int, int]] = field(default_factory=list)

    def add(self, i: np.ndarray, j: np.ndarray, is_leak: np.ndarray) -> None:
        self.n += len(i)
        self.n_leaks += int(is_leak.sum())
        for known, mask in ((self.first, np.ones(len(i), bool)), (self.first_leaks, is_leak)):
            room = N_NAMED - len(known)
            known += list(zip(i[mask][:room].tolist(), j[mask][:room].tolist(), strict=True))


def _near_identical(facts: ImageFacts, splits: Mapping[str, Sequence[int]]) -> _NearPairs:
    """Compare all thumbnails with all others, a chunk at a time."""
    role = np.zeros(len(facts.digests), int)
    role[list(splits["train"])], role[list(splits["test"])] = 1, 2
    usable = np.flatnonzero(facts.thumbnails.std(axis=1) > _FLAT)  # false for the NaN of damaged images
    thumbnails = facts.thumbnails[usable]
    file_id = np.unique(np.array([digest.hex() for digest in facts.digests]), return_inverse=True)[1]
    squared = (thumbnails**2).sum(1)
    limit = _NEAR**2 * thumbnails.shape[1]
    found = _NearPairs()
    for start in range(0, len(usable), _CHUNK):
        some = slice(start, start + _CHUNK)
        apart = squared[some, None] + squared[None, start:] - 2 * thumbnails[some] @ thumbnails[start:].T
        i, j = (usable[start + k] for k in np.nonzero(np.triu(apart <= limit, 1)))
        differ = file_id[i] != file_id[j]
        i, j = i[differ], j[differ]
        found.add(i, j, role[i] + role[j] == 3)
    return found


def _worst(names: Sequence[str], values: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """Number of the views in `mask` and the names of those with the smallest values."""
    views = np.flatnonzero(mask)
    order = views[np.argsort(values[views], kind="stable")][:N_NAMED]
    return {"n": len(views), "worst": {names[view]: round(float(values[view]), 3) for view in order}}


def describe_images(names: Sequence[str], facts: ImageFacts, splits: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What is wrong with the images, in counts with the names of the worst.

    Args:
        names: n names of the views.
        facts: of the same views.
        splits: view indices under train, test and others.
    Returns:
        Plain numbers for JSON. Values of `blurred` are shares of the median sharpness, of `black` mean grey levels
        (0 to 255), of `blown_out` shares of pixels that are not.
    """
    identical, near = _identical(facts), _near_identical(facts, splits)
    train, test = set(splits["train"]), set(splits["test"])
    leaks = [group for group in identical if train & set(group) and test & set(group)]
    ok = np.isfinite(facts.brightness)
    typical = float(np.median(facts.sharpness[ok])) if ok.any() else 0.0
    relative = facts.sharpness / max(typical, 1e-9)
    return {
        "n_checked": len(names),
        "n_damaged": len(facts.damaged),
        "damaged": list(facts.damaged.values())[:N_NAMED],
        "n_identical_groups": len(identical),
        "identical": [[names[view] for view in group[:N_NAMED]] for group in (leaks or identical)[:N_NAMED]],
        "n_identical_in_train_and_test": len(leaks),
        "n_near_identical_pairs": near.n,
        "near_identical": [[names[i], names[j]] for i, j in near.first_leaks or near.first],
        "n_near_identical_in_train_and_test": near.n_leaks,
        "blurred": _worst(names, relative, ok & (relative < _BLURRED)),
        "black": _worst(names, facts.brightness, ok & (facts.brightness < _BLACK)),
        "blown_out": _worst(names, 1 - facts.blown, ok & (facts.blown > _BLOWN)),
    }
