"""The automatic SceneFrame: where the field's cube lies, from training views alone; nothing is set by hand.

Sparse points come with the scene, or are triangulated from its training images, or, where neither gives enough, are
guessed in front of the cameras. Test and validation poses are never looked at.
"""

from __future__ import annotations

import logging
import pickle
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from posemap_fast.data.box_fit import BoxFit, BoxOptions, fit_box, wild_cameras
from posemap_fast.data.scene import Scene
from posemap_fast.data.triangulate import TriangulationOptions, triangulate_scene
from posemap_fast.errors import DatasetError, FileFormatError
from posemap_fast.files import atomic_path
from posemap_fast.geometry import Camera, SceneFrame

__all__ = ["FrameEstimate", "estimate_frame"]

_LOG = logging.getLogger(__name__)
_MIN_POINTS = 100
_NEAR_SHARE = 0.3  # of the 0.1 % smallest distance between a camera and a point it sees
_NEAR_LIMITS = (1e-4, 0.05)  # field units
_MAX_GIVEN = 50_000  # given points used for the fit
_GUESS_DEPTHS = (0.5, 1.0, 2.0)  # of the guessed distance, for the fallback points


@dataclass(frozen=True, eq=False)
class FrameEstimate:
    """The derived frame and what the log and the run's summary say about it."""

    frame: SceneFrame
    near: float  # field units; no content is nearer to a camera
    median_depth: float  # world units, from training cameras to the points they see
    points: torch.Tensor  # (p, 3) float32 world points that the box was fitted to
    scene_extent: float  # longest side of the content box, world units (m for metric scenes)
    share_inside: float  # of the points inside the content box
    ignored_views: list[int]  # training views whose pose is absurdly far away
    rule: str  # one sentence for the log

    def save(self, path: str | Path) -> None:
        """Write the estimate atomically, for a resumed run."""
        values = {field.name: getattr(self, field.name) for field in fields(self)} | {"frame": self.frame.to_dict()}
        with atomic_path(path) as temporary:
            torch.save(values, temporary)

    @classmethod
    def load(cls, path: str | Path) -> FrameEstimate:
        """The estimate written by `save`.

        Raises:
            FileFormatError: missing or damaged file.
        """
        try:
            values = torch.load(path, weights_only=True)
            return cls(**{**values, "frame": SceneFrame.from_dict(values["frame"])})
        except (OSError, RuntimeError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise FileFormatError(f"{path}: cannot read this scene frame ({error}); remove it and run again") from error


def _seen_distances(points: np.ndarray, c2w: np.ndarray, camera: Camera) -> np.ndarray:
    """Distances of points to the cameras that have them in their image, over at most 60 cameras and 5000 points."""
    some = points[:: max(1, len(points) // 5000)]
    found = []
    for pose in c2w[:: max(1, len(c2w) // 60)]:
        local = (some - pose[:3, 3]) @ pose[:3, :3]
        local = local[local[:, 2] > 0]
        u = local[:, 0] / local[:, 2] * camera.fx + camera.cx
        v = local[:, 1] / local[:, 2] * camera.fy + camera.cy
        in_view = (u > 0) & (u < camera.width) & (v > 0) & (v < camera.height)
        found.append(np.linalg.norm(local[in_view], axis=1))
    return np.concatenate(found)


def _typical_distance(c2w: np.ndarray) -> float:
    """Guess of the distance to the content from poses alone.

    Twice the distance to the point where the optical axes meet, when that lies before most cameras; otherwise three
    times the spread of the centres; 1 for a single centre.
    """
    centres, axes = c2w[:, :3, 3], c2w[:, :3, 2]
    spread = 2 * float(np.median(np.linalg.norm(centres - np.median(centres, axis=0), axis=1)))
    across = np.eye(3) - axes[:, :, None] * axes[:, None, :]  # projections off each axis
    system = across.sum(0)
    if np.linalg.cond(system) < 1e3:
        meeting = np.linalg.solve(system, np.einsum("nij,nj->i", across, centres))
        ahead = ((meeting - centres) * axes).sum(1)
        if np.mean(ahead > 0) > 0.7:
            return 2 * float(np.median(ahead[ahead > 0]))
    return 3 * spread if spread > 0 else 1.0


def _guessed_points(c2w: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Points in front of the cameras (corners and middle of each image), and distances around the typical one."""
    distance = _typical_distance(c2w)
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [0.5, 0.5]]) * [camera.width, camera.height]
    local = np.column_stack([(corners - [camera.cx, camera.cy]) / [camera.fx, camera.fy], np.ones(len(corners))])
    rays = np.einsum("nij,pj->npi", c2w[:, :3, :3], local)
    depths = distance * np.array(_GUESS_DEPTHS)
    points = c2w[:, None, None, :3, 3] + rays[:, :, None] * depths[:, None]
    return points.reshape(-1, 3), distance * np.linspace(0.1, 1.9, 1001)


def _content(
    scene: Scene, views: list[int], c2w: np.ndarray, options: TriangulationOptions | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Points (p, 3), distances from which `near` follows, and where the points come from."""
    if scene.points is not None and len(scene.points) >= _MIN_POINTS:
        given = scene.points.double().numpy()
        given = given[:: max(1, len(given) // _MAX_GIVEN)]
        distances = _seen_distances(given, c2w, scene.camera)
        if len(distances) >= _MIN_POINTS:
            return given, distances, f"{len(given)} given points"
    sparse = triangulate_scene(scene.images.select(torch.tensor(views)), c2w, scene.camera, options)
    if len(sparse.xyz) >= _MIN_POINTS:
        return sparse.xyz, sparse.distance, f"{len(sparse.xyz)} points triangulated in {sparse.n_pairs} pairs of views"
    points, distances = _guessed_points(c2w, scene.camera)
    return points, distances, f"camera frusta alone (only {len(sparse.xyz)} points could be triangulated)"


def _scene_frame(fit: BoxFit) -> SceneFrame:
    scale = 0.5 / fit.half
    offset = 0.5 - scale * fit.centre
    aabb = np.stack([fit.low, fit.high]) * scale + offset
    return SceneFrame(
        scale=scale,
        rotation=torch.from_numpy(fit.rotation),
        offset=torch.from_numpy(offset),
        n_cascades=fit.n_cascades,
        aabb=torch.from_numpy(aabb.clip(0.0, 1.0)),
    )


def estimate_frame(
    scene: Scene, box: BoxOptions | None = None, triangulation: TriangulationOptions | None = None
) -> FrameEstimate:
    """Cube, cascades and near distance of a scene from its training views; deterministic.

    Args:
        scene: images and poses; `points` are used when there are at least 100.
        box, triangulation: constants; the defaults serve rooms, objects and courtyards.
    Raises:
        DatasetError: no training view.
    """
    box = box or BoxOptions()
    train = scene.views("train")
    if not train:
        raise DatasetError(f"scene {scene.name}: no training views to derive the scene frame from; correct the split")
    c2w = scene.c2w[train].numpy()
    is_wild = wild_cameras(c2w[:, :3, 3], box.wild_factor)
    views = [view for view, wild in zip(train, is_wild, strict=True) if not wild]
    c2w = c2w[~is_wild]
    points, distances, source = _content(scene, views, c2w, triangulation)
    fit = fit_box(points, c2w, box)
    frame = _scene_frame(fit)
    near = float(np.clip(_NEAR_SHARE * np.percentile(distances, 0.1) * frame.scale, *_NEAR_LIMITS))
    extent = float((fit.high - fit.low).max())
    ignored = [view for view, wild in zip(train, is_wild, strict=True) if wild]
    sides = " x ".join(f"{side:.3g}" for side in fit.high - fit.low)
    rule = (
        f"{source}; content box {sides} {'m' if scene.is_metric else 'units'} in a cube of {2 * fit.half:.3g}, "
        f"{fit.n_cascades} cascade(s), {fit.share_inside:.1%} of the points inside, near {near / frame.scale:.3g}"
        + (f"; ignored {len(ignored)} pose(s) far off: {scene.names[ignored[0]]}" if ignored else "")
    )
    _LOG.info("scene frame: %s", rule)
    return FrameEstimate(
        frame=frame,
        near=near,
        median_depth=float(np.median(distances)),
        points=torch.from_numpy(points).float(),
        scene_extent=extent,
        share_inside=fit.share_inside,
        ignored_views=ignored,
        rule=rule,
    )
