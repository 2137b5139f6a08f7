"""Captures in the nerfstudio / instant-ngp layout: transforms.json, images, optional split.json and points.npz.

Convention of the file: OpenGL camera-to-world (x right, y up, z backward), intrinsics in pixels from the image's
corner. Loaded: OpenCV camera-to-world, views in the natural order of their names. Every defect of the input is one
line that names the file, the field, the value and the mend.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posemap_fast.data.image_files import ImageSpec, load_images, read_image, working_size
from posemap_fast.data.scene import DATASETS, DatasetKind, Scene
from posemap_fast.data.split_file import resolve_split
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, nearest_rotation, rigid_defect

__all__ = ["load_transforms_json"]

_OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
_INTRINSICS = ("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", "k1", "k2", "p1", "p2", "k3")
_UNSUPPORTED = ("k4", "k5", "k6", "is_fisheye")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{path}: cannot read: {error.strerror}; give a capture with a transforms.json") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file ({error.reason} at byte {error.start}); write it again") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}; write the file again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: must hold a JSON object; got a {type(content).__name__}")
    return content


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts frame 9 before frame 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _number(where: str, values: dict[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DatasetError(f"{where}: {key}: must be a finite number; got {value!r}; correct the calibration")
    return float(value)


def _image_path(where: str, root: Path, name: object) -> Path:
    """The file of one frame: inside the capture's folder, suffix added when the capture leaves it out."""
    if not isinstance(name, str) or not name:
        raise DatasetError(f"{where}.file_path: must be the name of an image; got {name!r}; name the frame's file")
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise DatasetError(f"{where}.file_path: '{name}' leads out of {root}; keep the images in the capture's folder")
    if not path.suffix:
        path = next((path.with_suffix(s) for s in _SUFFIXES if path.with_suffix(s).is_file()), path)
    if not path.is_file():
        raise DatasetError(f"{where}.file_path: image {path} does not exist; restore it or remove the frame")
    return path


def _pose(where: str, matrix: object) -> torch.Tensor:
    """OpenCV camera-to-world (4, 4) float64 of one OpenGL transform_matrix."""
    field = f"{where}.transform_matrix"
    try:
        c2w = torch.tensor(matrix, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"{field}: must be 4 rows of 4 numbers; got {str(matrix)[:60]}; write the pose again"
        ) from error
    if c2w.shape != (4, 4):
        raise DatasetError(f"{field}: must be 4x4; got shape {tuple(c2w.shape)}; write the full pose")
    defect = rigid_defect(c2w)
    if defect:
        raise DatasetError(f"{field}: {defect}; give a rotation and a translation, or remove the frame")
    c2w[:3, :3] = nearest_rotation(c2w[:3, :3])
    return c2w @ _OPENGL_TO_OPENCV


def _frames(path: Path, content: dict[str, Any]) -> list[tuple[str, Path, torch.Tensor, dict[str, Any]]]:
    """(name, file, pose, raw frame) of all frames in natural order of their names."""
    raw = content.get("frames")
    if not isinstance(raw, list) or not raw:
        raise DatasetError(f"{path}: frames: must be a list of at least one frame; got {str(raw)[:40]}; add the views")
    root = path.parent.resolve()
    frames = []
    first_use: dict[Path, int] = {}
    for index, frame in enumerate(raw):
        where = f"{path}: frames[{index}]"
        if not isinstance(frame, dict):
            raise DatasetError(f"{where}: must be an object with file_path and transform_matrix; got {str(frame)[:40]}")
        image = _image_path(where, root, frame.get("file_path"))
        if image in first_use:
            raise DatasetError(
                f"{where}.file_path: '{frame['file_path']}' is already frames[{first_use[image]}]; remove one of them"
            )
        first_use[image] = index
        pose = _pose(where, frame.get("transform_matrix"))
        frames.append((image.relative_to(root).as_posix(), image, pose, frame))
    return sorted(frames, key=lambda frame: _natural(frame[0]))


def _shared_intrinsics(path: Path, content: dict[str, Any], frames: list[dict[str, Any]]) -> dict[str, Any]:
    """Intrinsics of the file, or of its frames where those agree."""
    values = {key: content[key] for key in (*_INTRINSICS, *_UNSUPPORTED) if key in content}
    for key in (*_INTRINSICS, *_UNSUPPORTED):
        own = [(frame["file_path"], frame.get(key, values.get(key))) for frame in frames]
        differing = next(((name, value) for name, value in own if value != own[0][1] and value == value), None)
        if differing is not None:
            raise DatasetError(
                f"{path}: {key}: {own[0][0]} has {own[0][1]} but {differing[0]} has {differing[1]}; one shared camera "
                "is supported: undistort the images to one pinhole camera"
            )
        if own[0][1] is not None:
            values[key] = own[0][1]
    return values


def _focal(where: str, values: dict[str, Any], key: str, angle_key: str, size: int) -> float | None:
    """Focal length in pixels from fl_* or from the angle of view; None when neither is given."""
    if key in values:
        focal = _number(where, values, key, 0.0)
        if focal <= 0:
            raise DatasetError(f"{where}: {key}: must be positive; got {focal}; correct the calibration")
        return focal
    if angle_key in values:
        angle = _number(where, values, angle_key, 0.0)
        if not 0 < angle < math.pi:
            raise DatasetError(f"{where}: {angle_key}: must lie between 0 and pi; got {angle}; correct the calibration")
        return 0.5 * size / math.tan(0.5 * angle)
    return None


def _camera(path: Path, values: dict[str, Any], first_image: Path) -> tuple[Camera, tuple[float, ...]]:
    """The stored camera and its OpenCV distortion k1 k2 p1 p2 k3 (empty for a pinhole)."""
    for key in _UNSUPPORTED:
        if values.get(key):
            raise DatasetError(
                f"{path}: {key}: {values[key]} is not supported; undistort the images to a pinhole camera"
            )
    where = str(path)
    if "w" in values and "h" in values:
        width, height = (_number(where, values, key, 0.0) for key in ("w", "h"))
    else:
        height, width = read_image(first_image).shape[:2]
    if width < 1 or height < 1 or width % 1 or height % 1:
        raise DatasetError(f"{path}: w, h: must be positive whole numbers; got {width}, {height}; correct them")
    width, height = int(width), int(height)
    fx = _focal(where, values, "fl_x", "camera_angle_x", width)
    fy = _focal(where, values, "fl_y", "camera_angle_y", height)
    fx, fy = fx or fy, fy or fx
    if fx is None or fy is None:
        raise DatasetError(f"{path}: fl_x: missing, and so is camera_angle_x; add one of them")
    cx, cy = _number(where, values, "cx", width / 2), _number(where, values, "cy", height / 2)
    distortion = tuple(_number(where, values, key, 0.0) for key in ("k1", "k2", "p1", "p2", "k3"))
    return Camera(width, height, fx, fy, cx, cy), distortion if any(distortion) else ()


def _points(path: Path) -> torch.Tensor | None:
    """Sparse points (p, 3) of points.npz, or None without the file."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            points = np.asarray(archive["xyz"], dtype=np.float32)
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise DatasetError(f"{path}: xyz: cannot read the points ({error}); write it again or remove it") from error
    if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
        raise DatasetError(f"{path}: xyz: must be finite and (n, 3); got {points.shape}; write it again or remove it")
    return torch.from_numpy(points)


def load_transforms_json(spec: str, max_side: int | None = None) -> Scene:
    """Load a capture.

    Args:
        spec: the folder with transforms.json, or a JSON file of that format.
        max_side: limit of the longer image side in pixels; images are reduced with area averaging, K follows.
    Returns:
        `Scene` with OpenCV poses, one pinhole camera and views in natural order of their names.
    Raises:
        DatasetError: damaged or inconsistent input, with file, field, value and mend.
        ConfigError: max_side below 8.
    """
    if max_side is not None and max_side < 8:
        raise ConfigError(f"dataset transforms_json: max_side must be at least 8 pixels; got {max_side}")
    path = Path(spec)
    path = path / "transforms.json" if path.is_dir() else path
    content = _read_json(path)
    frames = _frames(path, content)
    names = [name for name, _, _, _ in frames]
    camera, distortion = _camera(path, _shared_intrinsics(path, content, [f[3] for f in frames]), frames[0][1])
    split_path = path.with_name("split.json")
    lists = _read_json(split_path) if split_path.is_file() else None
    splits, rule = resolve_split(split_path if lists is not None else path, names, lists)
    size = working_size(camera, max_side)
    images = load_images([image for _, image, _, _ in frames], ImageSpec(camera, distortion, size))
    return Scene(
        name=path.parent.resolve().name,
        images=torch.from_numpy(images),
        names=names,
        c2w=torch.stack([pose for _, _, pose, _ in frames]),
        camera=camera.resized(*size),
        splits=splits,
        is_metric=str(content.get("units", "")).strip().lower() in ("m", "metre", "metres", "meter", "meters"),
        split_rule=rule,
        points=_points(path.with_name("points.npz")),
    )


def _recognises(spec: str) -> bool:
    path = Path(spec)
    return (path / "transforms.json").is_file() or (path.suffix == ".json" and path.is_file())


DATASETS.register("transforms_json")(
    DatasetKind(_recognises, load_transforms_json, "a folder with transforms.json, or that file")
)
