"""Capture: what every parser of a dataset on disk gives, before any image is decoded; `scene_of` makes a Scene of it.

Frames may have cameras and lenses of their own. A Scene has one pinhole camera, so images whose camera differs are
resampled to a shared one: exact for pinholes (a change of K is a homography), and the undistortion for lenses.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posemap_fast.data.image_files import ImageLoader, working_size
from posemap_fast.data.image_stack import decode_images
from posemap_fast.data.scene import DATASETS, DatasetKind, Scene, check_options
from posemap_fast.data.split_file import resolve_split
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens
from posemap_fast.registry import Registry

__all__ = [
    "PARSERS",
    "Capture",
    "Frame",
    "Parser",
    "inside",
    "natural_order",
    "parse_capture",
    "register_parser",
    "scene_of",
    "shared_camera",
]

_LONGEST_PATH, _LONGEST_NAME = 2000, 200  # bytes; file systems refuse longer ones, each in its own way
MIN_COVERAGE = 0.6  # share of the shared camera's image that a frame's own image must fill


@dataclass(frozen=True)
class Frame:
    """One posed image."""

    name: str  # unique in the capture: its path in the dataset, "/" between folders
    path: Path  # the image file
    c2w: torch.Tensor  # (4, 4) float64 OpenCV camera-to-world, world unit of the dataset
    lens: Lens  # of the stored image


@dataclass
class Capture:
    """Posed images of one place, not decoded yet."""

    name: str
    source: Path  # the file or folder it was read from, to be named in errors
    frames: list[Frame]  # in natural order of their names
    is_metric: bool
    lists: dict[str, Any] | None = None  # frame names under train, val, test, and `rule` in words; None: not said
    lists_source: Path | None = None  # where the lists come from
    points: torch.Tensor | None = None  # (p, 3) float32 sparse points, world unit
    ground_truth: str = ""  # where the poses come from, when there is a choice: dslam, sfm
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> number of frames left out

    def notes(self) -> list[str]:
        """One sentence per reason for which frames were left out."""
        return [f"{count} frame(s) left out: {reason}" for reason, count in self.skipped.items()]


@dataclass(frozen=True)
class Parser:
    """One dataset format: `recognises(path)` looks, `parse(path, **options)` reads poses and cameras, no pixels."""

    recognises: Callable[[Path], bool]
    parse: Callable[..., Capture]
    expects: str  # what it looks for, in words


PARSERS: Registry[Parser] = Registry("dataset format")


def register_parser(name: str, parser: Parser) -> None:
    """Make a format known to `parse_capture`, and to `load_scene` with the parser's options and `max_side`."""
    PARSERS.register(name)(parser)

    def load(spec: str, max_side: int | None = None, **options: object) -> Scene:
        return scene_of(parser.parse(Path(spec), **options), max_side)

    options = list(inspect.signature(parser.parse).parameters)[1:]
    kind = DatasetKind(lambda spec: parser.recognises(Path(spec)), load, parser.expects, ("max_side", *options))
    DATASETS.register(name)(kind)


def parse_capture(path: str | Path, dataset: str | None = None, **options: object) -> Capture:
    """The capture at `path`, by the parser `dataset` or the first that recognises it.

    Raises:
        DatasetError: nothing recognised, or damaged input, with file, line, value and mend.
        ConfigError: unknown parser or option.
    """
    path = Path(path)
    name = dataset or next((known for known in PARSERS if PARSERS.get(known).recognises(path)), None)
    if name is None:
        raise DatasetError(f"{path}: no dataset found here ({'; '.join(PARSERS.get(n).expects for n in PARSERS)})")
    parser = PARSERS.get(name)
    check_options(f"dataset {name}", options, list(inspect.signature(parser.parse).parameters)[1:])
    return parser.parse(path, **options)


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts frame 9 before frame 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def inside(root: Path, name: str, where: str) -> Path:
    """`root / name`, which must not lead out of `root`.

    Raises:
        DatasetError: it does, or it cannot be a path; the message starts with `where` (file and line or field).
    """
    try:
        if len(name.encode()) > _LONGEST_PATH or max(map(len, name.encode().split(b"/"))) > _LONGEST_NAME:
            raise ValueError("too long")
        path = (root / name).resolve()
        path.is_file()
        leads_out = not path.is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:
        raise DatasetError(f"{where}: {name[:60]!r} cannot be a file name ({error}); correct it") from error
    if leads_out:
        raise DatasetError(f"{where}: '{name}' leads out of {root}; keep the images in the dataset's folder")
    return path


def shared_camera(lenses: Sequence[Lens]) -> Camera:
    """The pinhole camera that all images are brought to.

    The frames' own camera where they agree. Else the commonest image size with the focal length that 95 % of the
    frames do not exceed (so that their images fill it), and the median principal point.
    """
    cameras = [lens.camera for lens in lenses]
    if all(camera == cameras[0] for camera in cameras):
        return cameras[0]
    (width, height), _ = Counter((camera.width, camera.height) for camera in cameras).most_common(1)[0]
    scaled = [camera.resized(width, height) for camera in cameras]
    fx, fy = (float(np.quantile([getattr(c, key) for c in scaled], 0.95, method="higher")) for key in ("fx", "fy"))
    cx, cy = (float(np.median([getattr(c, key) for c in scaled])) for key in ("cx", "cy"))
    return Camera(width, height, fx, fy, cx, cy)


def _coverage(lens: Lens, target: Camera) -> float:
    """Share of `target`'s image that the stored image fills, on a coarse grid."""
    coarse = target.resized(16, 12)
    where = lens.pixels((coarse.pixel_grid().double().numpy() - [coarse.cx, coarse.cy]) / [coarse.fx, coarse.fy])
    size = np.array([lens.camera.width, lens.camera.height])
    return float(((where >= 0) & (where <= size)).all(axis=1).mean())


def _fitting(capture: Capture) -> tuple[list[Frame], Camera]:
    """The frames whose images fill the shared camera's, and that camera."""
    target = shared_camera([frame.lens for frame in capture.frames])
    covered = {lens: _coverage(lens, target) >= MIN_COVERAGE for lens in {frame.lens for frame in capture.frames}}
    kept = [frame for frame in capture.frames if covered[frame.lens]]
    if len(kept) < len(capture.frames):
        reason = f"their camera sees too little of what the shared one does ({target.width}x{target.height})"
        capture.skipped[reason] = len(capture.frames) - len(kept)
    return kept, target


def _of_kept(splits: dict[str, list[int]], frames: list[Frame], kept: list[Frame]) -> dict[str, list[int]]:
    """The split of the kept frames, as indices into them."""
    position = {frame.name: index for index, frame in enumerate(kept)}
    return {
        key: [position[frames[view].name] for view in views if frames[view].name in position]
        for key, views in splits.items()
    }


def scene_of(capture: Capture, max_side: int | None = None) -> Scene:
    """Decode the images of a capture, or find them decoded in the cache, undistorted and at the working size.

    Args:
        capture: frames and split.
        max_side: limit of the longer image side in pixels; reduced with area averaging, K follows.
    Raises:
        DatasetError: a damaged image, one whose size is not its camera's, or no usable split.
        ConfigError: max_side below 8.
    """
    if max_side is not None and max_side < 8:
        raise ConfigError(f"max_side must be at least 8 pixels; got {max_side}")
    if not capture.frames:
        raise DatasetError(f"{capture.source}: no usable frame ({'; '.join(capture.notes()) or 'none is listed'})")
    splits, rule = resolve_split(
        capture.lists_source or capture.source, [frame.name for frame in capture.frames], capture.lists
    )
    frames, target = _fitting(capture)
    splits = _of_kept(splits, capture.frames, frames)
    size = working_size(target, max_side)
    load = ImageLoader([frame.path for frame in frames], [frame.lens for frame in frames], target, size)
    stack, digest = decode_images(len(frames), size, load, load.key())
    return Scene(
        name=capture.name,
        images=stack,
        names=[frame.name for frame in frames],
        c2w=torch.stack([frame.c2w for frame in frames]),
        camera=target.resized(*size),
        splits=splits,
        is_metric=capture.is_metric,
        split_rule=rule,
        points=capture.points,
        ground_truth=capture.ground_truth,
        notes=capture.notes(),
        image_digest=digest,
    )
