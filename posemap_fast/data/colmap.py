"""COLMAP models: a folder with a sparse model, text or binary, and the images it was made of.

Convention of the files: world-to-camera quaternions (w first) and translations, OpenCV camera axes, pixels from the
image's corner, a world of arbitrary scale. Files of rigs and frames are not read: images hold their poses already.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from posemap_fast.data import colmap_binary, colmap_text
from posemap_fast.data.capture import PARSERS, Capture, Frame, Parser, inside, natural_order, register_parser
from posemap_fast.data.colmap_cameras import CameraRecord, ImageRecord, lens_of
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Lens, invert_c2w, make_c2w, matrix_from_quaternion

__all__ = ["parse_colmap"]

_log = logging.getLogger(__name__)
_LONGEST_NAME = 1000  # characters
_LEAST_NORM = 1e-6  # of a quaternion
_MISSING = "their image file is missing"


@dataclass(frozen=True)
class _Form:
    """Text or binary: how its three files are read."""

    suffix: str
    read_cameras: Callable[[Path], Iterator[CameraRecord]]
    read_images: Callable[[Path], Iterator[ImageRecord]]
    read_points: Callable[[Path], np.ndarray]
    count_images: Callable[[Path], int]


_FORMS = tuple(  # binary first: COLMAP prefers it too
    _Form(suffix, form.read_cameras, form.read_images, form.read_points, form.count_images)
    for suffix, form in ((".bin", colmap_binary), (".txt", colmap_text))
)


@dataclass(frozen=True)
class _Model:
    """The files of one sparse model."""

    folder: Path
    form: _Form

    def file(self, name: str) -> Path:
        return self.folder / f"{name}{self.form.suffix}"

    @property
    def images(self) -> Path:
        return self.file("images")


def _model_in(folder: Path) -> _Model | None:
    """The model whose files lie in `folder`; None without cameras and images."""
    models = (_Model(folder, form) for form in _FORMS)
    return next((m for m in models if _is_file(m.file("cameras")) and _is_file(m.images)), None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that the file system cannot have
        return False


def _models(path: Path) -> list[_Model]:
    """The models that `path` offers: its own, else the one in sparse, else the numbered ones there."""
    for folder in (path, path / "sparse"):
        model = _model_in(folder)
        if model is not None:
            return [model]
    numbered = [child for child in (path / "sparse").glob("*") if child.name.isdecimal()]
    found = [_model_in(child) for child in sorted(numbered, key=lambda child: natural_order(child.name))]
    return [model for model in found if model is not None]


def _chosen(path: Path) -> _Model:
    """The model with most images; the first of those with as many."""
    models = _models(path)
    if not models:
        raise DatasetError(
            f"{path}: no COLMAP model here, nor in sparse or sparse/0; give a folder with cameras and images "
            "(.bin or .txt)"
        )
    if len(models) == 1:
        return models[0]
    counts = [model.form.count_images(model.images) for model in models]
    best = models[counts.index(max(counts))]
    _log.info("%s: %d models, with %s images; %s is used", path, len(models), counts, best.folder)
    return best


def _cameras(records: Iterable[CameraRecord]) -> dict[int, Lens]:
    lenses: dict[int, Lens] = {}
    for record in records:
        if record.camera_id in lenses:
            raise DatasetError(
                f"{record.where}: CAMERA_ID: {record.camera_id} is there already; remove one of the two cameras"
            )
        lenses[record.camera_id] = lens_of(record)
    return lenses


def _check_image(record: ImageRecord, lenses: dict[int, Lens]) -> None:
    """Raise `DatasetError` for a pose, a camera or a name that cannot be; numbers are finite already."""
    norm = math.hypot(*record.pose[:4])
    if norm < _LEAST_NORM:
        raise DatasetError(
            f"{record.where}: QW QX QY QZ: a quaternion of norm {norm:g} is no rotation; remove the image"
        )
    if record.camera_id not in lenses:
        known = ", ".join(map(str, sorted(lenses)[:8])) or "none"
        raise DatasetError(
            f"{record.where}: CAMERA_ID: {record.camera_id} is not among the cameras (known: {known}); "
            "take cameras and images of the same model"
        )
    if record.name.splitlines() != [record.name] or len(record.name) > _LONGEST_NAME:
        raise DatasetError(f"{record.where}: NAME: {record.name[:60]!r} cannot be a file name; correct it")


def _images(records: Iterable[ImageRecord], lenses: dict[int, Lens]) -> list[ImageRecord]:
    """The registered images, checked, with unique names."""
    images: list[ImageRecord] = []
    first_use: dict[str, str] = {}
    for record in records:
        _check_image(record, lenses)
        name = PurePosixPath(record.name).as_posix()
        if name in first_use:
            raise DatasetError(
                f"{record.where}: NAME: '{name}' is already the image of {first_use[name].rpartition(': ')[2]}; "
                "remove one of them"
            )
        first_use[name] = record.where
        images.append(record._replace(name=name))
    return images


def _poses(images: list[ImageRecord]) -> torch.Tensor:
    """(n, 4, 4) float64 camera-to-world."""
    pose = torch.tensor([record.pose for record in images], dtype=torch.float64).reshape(-1, 7)
    return invert_c2w(make_c2w(matrix_from_quaternion(pose[:, :4]), pose[:, 4:]))


def _image_folders(path: Path, images: str) -> list[Path]:
    """Where the images may be: the folder that the caller names, or `images` in the dataset and the dataset itself."""
    if images:
        if not (path / images).is_dir():
            raise DatasetError(f"{path / images}: no such folder; give the folder of the images as images=FOLDER")
        return [path / images]
    inner = path / "images"
    if inner.is_dir() and not inner.resolve().is_relative_to(path.resolve()):
        raise DatasetError(f"{inner}: leads out of {path}; say that it is meant with images={inner.resolve()}")
    return [inner, path] if inner.is_dir() else [path]


def _files(folder: Path, images: list[ImageRecord]) -> list[Path | None]:
    """The image files in `folder`, None where there is none."""
    paths = (inside(folder, record.name, f"{record.where}: NAME") for record in images)
    return [path if _is_file(path) else None for path in paths]


def _frames(path: Path, folders: list[Path], images: list[ImageRecord], lenses: dict[int, Lens]) -> list[Frame]:
    """The images whose file is there, from the folder that holds most of them."""
    files = max((_files(folder, images) for folder in folders), key=lambda found: sum(f is not None for f in found))
    frames = [
        Frame(record.name, file, c2w, lenses[record.camera_id])
        for record, file, c2w in zip(images, files, _poses(images), strict=True)
        if file is not None
    ]
    if not frames:
        raise DatasetError(
            f"{path}: none of the {len(images)} images is in {' or '.join(map(str, folders))}; "
            "give their folder with the option images=FOLDER"
        )
    return sorted(frames, key=lambda frame: natural_order(frame.name))


def _points(model: _Model) -> torch.Tensor | None:
    """(p, 3) float32; None without a file or any point in it."""
    path = model.file("points3D")
    points = model.form.read_points(path) if _is_file(path) else np.empty((0, 3))
    return torch.from_numpy(points).float() if len(points) else None


def parse_colmap(path: Path, images: str = "") -> Capture:
    """Read a COLMAP model and find its images.

    Args:
        path: folder with the model in it, in sparse or in sparse/0 (of several numbered ones, that with most images).
        images: folder of the images, relative to `path` or absolute; empty: `images` in `path`, or `path` itself.
    Returns:
        Frames named as in the model, in natural order; images without a file are counted in `skipped`. Not metric.
    Raises:
        DatasetError: damaged or inconsistent files, with line or byte, value and mend; or no image file at all.
    """
    model = _chosen(path)
    lenses = _cameras(model.form.read_cameras(model.file("cameras")))
    registered = _images(model.form.read_images(model.images), lenses)
    frames = _frames(model.images, _image_folders(path, images), registered, lenses)
    n_missing = len(registered) - len(frames)
    return Capture(
        name=path.resolve().name,
        source=model.images,
        frames=frames,
        is_metric=False,
        points=_points(model),
        skipped={_MISSING: n_missing} if n_missing else {},
    )


def _recognises(path: Path) -> bool:
    others = (PARSERS.get(name) for name in PARSERS if name != "colmap")  # a model beside another dataset's own files
    return path.is_dir() and bool(_models(path)) and not any(parser.recognises(path) for parser in others)


_EXPECTS = "a folder with a COLMAP model (cameras and images, .bin or .txt, there or in sparse/0) and its images"
register_parser("colmap", Parser(_recognises, parse_colmap, _EXPECTS))
