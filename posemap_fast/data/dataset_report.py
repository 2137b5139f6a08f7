"""What a dataset is and whether it is sane, in plain numbers: all checks together, for captures and other scenes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posemap_fast.data.auto_frame import FrameEstimate, estimate_frame
from posemap_fast.data.border import find_border
from posemap_fast.data.capture import PARSERS, Capture, Frame, parse_capture, scene_of, shared_camera
from posemap_fast.data.epipolar import GOOD, check_poses
from posemap_fast.data.image_checks import ImageFacts, describe_images, measure_images
from posemap_fast.data.image_files import ImageLoader
from posemap_fast.data.image_stack import IN_MEMORY
from posemap_fast.data.sanity import describe_cameras, describe_extent, describe_poses, nearest_training_views
from posemap_fast.data.scene import SPLIT_NAMES, Scene, load_scene, pose_content
from posemap_fast.data.split_file import resolve_split
from posemap_fast.data.triangulate import TriangulationOptions
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens

__all__ = ["DatasetReport", "report_dataset"]

_FRAME_SIDE = 640  # px; images of large captures are reduced to this for the scene frame
_BAD_IMAGES = ("black", "blown_out", "blurred")


@dataclass(frozen=True, eq=False)
class _Views:
    """Posed images, from a capture on disk or from a scene in memory."""

    names: list[str]
    c2w: torch.Tensor  # (n, 4, 4) float64
    lenses: list[Lens]
    splits: dict[str, list[int]]
    read: Callable[[int], np.ndarray]  # pinhole image of the view's camera
    content: Callable[[int], bytes]  # what is hashed: the file


@dataclass(frozen=True, eq=False)
class DatasetReport:
    """The description for JSON, and what a picture of the dataset needs."""

    description: dict[str, Any]
    c2w: torch.Tensor  # (n, 4, 4) float64
    cameras: list[Camera]
    splits: dict[str, list[int]]
    estimate: FrameEstimate | None
    is_metric: bool


def _undistorting(frames: Sequence[Frame]) -> Callable[[int], np.ndarray]:
    """View -> its image as the pinhole camera of its own lens sees it."""
    paths, lenses = [frame.path for frame in frames], [frame.lens for frame in frames]

    @functools.lru_cache(maxsize=2)  # a loader keeps its lens's sampling map, which is as large as an image
    def loader(lens: Lens) -> ImageLoader:
        return ImageLoader(paths, lenses, lens.camera, (lens.camera.width, lens.camera.height))

    return lambda view: loader(lenses[view])(view)


def _file_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path}: cannot read this image: {error.strerror}; restore the file") from error


def _views_of_capture(capture: Capture, splits: dict[str, list[int]]) -> _Views:
    frames = capture.frames
    return _Views(
        [frame.name for frame in frames],
        torch.stack([frame.c2w for frame in frames]),
        [frame.lens for frame in frames],
        splits,
        _undistorting(frames),
        lambda view: _file_bytes(frames[view].path),
    )


def _views_of_scene(scene: Scene) -> _Views:
    return _Views(
        scene.names,
        scene.c2w,
        [Lens(scene.camera)] * scene.n_views,
        scene.splits,
        lambda view: scene.images[view].numpy(),
        lambda view: scene.images[view].numpy().tobytes(),
    )


def _frame_scene(capture: Capture, splits: Mapping[str, Sequence[int]], damaged: Sequence[int], fast: bool) -> Scene:
    """What the scene frame is derived from: the whole capture where it is small, else some of its training views."""
    n_bytes = sum(3 * frame.lens.camera.width * frame.lens.camera.height for frame in capture.frames)
    if not fast and not damaged and n_bytes <= IN_MEMORY:
        return scene_of(capture)
    readable = {key: [view for view in views if view not in set(damaged)] for key, views in splits.items()}
    train = readable["train"]
    count = min(len(train), TriangulationOptions.max_views)
    some = {
        "train": [train[i] for i in np.unique(np.linspace(0, len(train) - 1, count).round().astype(int))],
        "val": readable["val"][:1],
        "test": readable["test"][:1],
    }
    chosen = sorted(view for views in some.values() for view in views)
    lists = {key: [capture.frames[view].name for view in views] for key, views in some.items()}
    part = replace(capture, frames=[capture.frames[view] for view in chosen], lists=lists, skipped={})
    return scene_of(part, _FRAME_SIDE)


def _estimate(scene: Callable[[], Scene]) -> tuple[Scene | None, FrameEstimate | None, str]:
    """The scene, its frame and the sentence about it; a frame that cannot be had is no reason to say nothing."""
    try:
        loaded = scene()
        estimate = estimate_frame(loaded)
    except (ConfigError, DatasetError) as error:  # poses may be so far apart that no cube holds them
        return None, None, f"not derived: {error}"
    return loaded, estimate, f"{estimate.rule}; from {len(loaded.views('train'))} training views"


def _dark_frame(scene: Scene | None) -> dict[str, Any] | None:
    """Of the training images, in pixels of the size that is told; None where none was found, or no scene frame."""
    if scene is None:
        return None
    border = find_border(scene.images.select(torch.tensor(scene.views("train"), dtype=torch.long)))
    size = {"image_width": scene.camera.width, "image_height": scene.camera.height}
    return {**border._asdict(), **size} if any(border) else None


def _check_training_poses(views: _Views, damaged: Sequence[int]) -> dict[str, Any]:
    train = [view for view in views.splits["train"] if view not in set(damaged)]
    cameras = [views.lenses[view].camera for view in train]
    check = check_poses(views.c2w[train].numpy(), cameras, lambda index: views.read(train[index]))
    return check.to_dict()


def _content_digest(views: _Views, facts: ImageFacts) -> str:
    """SHA-256 over files, names, poses, lenses and split: equal for equal datasets, wherever they lie."""
    digest = hashlib.sha256(repr((views.names, views.lenses, sorted(views.splits.items()))).encode())
    digest.update(b"".join(facts.digests))
    digest.update(pose_content(views.c2w))
    return digest.hexdigest()


def _problems(description: Mapping[str, Any]) -> list[str]:
    """One sentence for each finding that a user should look at, the gravest first."""
    poses, nearest, check = description["poses"], description["test_to_nearest_train"], description["pose_check"]
    images = description.get("images", {})
    counts: list[tuple[int, str]] = [
        (images.get("n_damaged", 0), "damaged image(s)"),
        (len(poses["not_rigid"]), "pose(s) that are not rigid"),
        (description["n_far_off"], "camera(s) absurdly far from the others"),
        (images.get("n_identical_in_train_and_test", 0), "image file(s) in train and in test"),
        (nearest["n_identical_poses"], "test view(s) with the pose of a training view"),
        (images.get("n_near_identical_in_train_and_test", 0), "pair(s) of nearly identical train and test images"),
        (images.get("n_identical_groups", 0), "group(s) of identical image files"),
        *((images.get(key, {}).get("n", 0), f"{key.replace('_', ' ')} image(s)") for key in _BAD_IMAGES),
    ]
    found = [] if check["verdict"] == GOOD else [check["verdict"]]
    found += [f"{count} {what}" for count, what in counts if count]
    if description["dark_frame"]:
        found.append(
            "a dark frame around the images, as undistortion leaves (where it shows at the map's size, left out)"
        )
    return found + [f"{count} frame(s) left out: {reason}" for reason, count in description["skipped"].items()]


def report_dataset(spec: str, dataset: str | None = None, fast: bool = False, **options: object) -> DatasetReport:
    """Look at everything that can be checked without training.

    Args:
        spec: path of a capture, or the name of a procedural scene.
        dataset: name of its format; None = recognised.
        fast: only as many images are read as the checks of poses and frame need, and none is judged.
        options: of the parser, such as `gt`.
    Raises:
        DatasetError: nothing recognised, or poses, cameras or split that cannot be read.
        ConfigError: unknown format or option.
    """
    path = Path(spec)
    is_capture = dataset in PARSERS if dataset else any(PARSERS.get(name).recognises(path) for name in PARSERS)
    if not is_capture:
        scene = load_scene(spec, dataset, **options)
        return _report(scene, _views_of_scene(scene), lambda _: scene, fast, scene.split_rule, {})
    capture = parse_capture(path, dataset, **options)
    if not capture.frames:
        raise DatasetError(f"{capture.source}: no usable frame ({'; '.join(capture.notes()) or 'none is listed'})")
    names = [frame.name for frame in capture.frames]
    found, rule = resolve_split(capture.lists_source or capture.source, names, capture.lists)
    splits = {key: found.get(key, []) for key in SPLIT_NAMES}
    views = _views_of_capture(capture, splits)
    return _report(
        capture, views, lambda damaged: _frame_scene(capture, splits, damaged, fast), fast, rule, capture.skipped
    )


def _report(
    source: Capture | Scene,
    views: _Views,
    frame_scene: Callable[[Sequence[int]], Scene],
    fast: bool,
    rule: str,
    skipped: Mapping[str, int],
) -> DatasetReport:
    facts = None if fast else measure_images(len(views.names), views.content, views.read)
    damaged = sorted(facts.damaged) if facts else []
    scene, estimate, frame = _estimate(lambda: frame_scene(damaged))
    is_whole = scene is not None and scene.names == views.names
    description: dict[str, Any] = {
        "kind": "dataset",
        "name": source.name,
        "views": {key: len(found) for key, found in views.splits.items()},
        "split": rule,
        "skipped": dict(skipped),
        "ground_truth": source.ground_truth,
        "camera": shared_camera(views.lenses).to_dict(),
        "stored": describe_cameras(views.lenses),
        "unit": "m" if source.is_metric else "not metric",
        **describe_extent(views.names, views.c2w),
        "poses": describe_poses(views.names, views.c2w),
        "pose_check": _check_training_poses(views, damaged),
        "test_to_nearest_train": nearest_training_views(views.names, views.c2w, views.splits),
        "frame": frame,
        "dark_frame": _dark_frame(scene),
        "fingerprint": scene.fingerprint if scene is not None and is_whole else None,
    }
    if facts is not None:
        description["images"] = describe_images(views.names, facts, views.splits)
        description["content_sha256"] = _content_digest(views, facts)
    description["problems"] = _problems(description)
    cameras = [lens.camera for lens in views.lenses]
    return DatasetReport(description, views.c2w, cameras, views.splits, estimate, source.is_metric)
