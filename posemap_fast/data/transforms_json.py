"""Captures in the nerfstudio / instant-ngp layout: transforms.json, images, optional split.json and points.npz.

Convention of the file: OpenGL camera-to-world (x right, y up, z backward), intrinsics in pixels from the image's
corner. Loaded: OpenCV camera-to-world, views in the natural order of their names. Every defect of the input is one
line that names the file, the field, the value and the mend.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from posemap_fast.data.capture import Capture, Frame, Parser, inside, natural_order, register_parser
from posemap_fast.data.image_files import read_image
from posemap_fast.data.npz import read_npz_array
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.files import write_text
from posemap_fast.geometry import Camera, Lens, nearest_rotation, rigid_defect

__all__ = ["parse_transforms_json", "write_transforms_json"]

OPENGL_TO_OPENCV = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
_SUFFIXES = (".png", ".jpg", ".jpeg")
_METRES = ("m", "metre", "metres", "meter", "meters")
_LENS_OF_MODEL = {
    "PINHOLE": "pinhole",
    "SIMPLE_PINHOLE": "pinhole",
    "OPENCV": "opencv",
    "OPENCV_FISHEYE": "fisheye",
}
_COEFFICIENTS = {"opencv": ("k1", "k2", "p1", "p2", "k3", "k4", "k5", "k6"), "fisheye": ("k1", "k2", "k3", "k4")}
_INTRINSICS = (
    *("w", "h", "fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", "camera_model", "is_fisheye"),
    *("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2"),
)


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


def _number(where: str, values: Mapping[str, Any], key: str, default: float) -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise DatasetError(f"{where}: {key}: must be a finite number; got {value!r}; correct the calibration")
    return float(value)


def _image_path(where: str, root: Path, name: object) -> Path:
    """The file of one frame: inside the capture's folder, suffix added when the capture leaves it out."""
    if not isinstance(name, str) or not name:
        raise DatasetError(f"{where}.file_path: must be the name of an image; got {name!r}; name the frame's file")
    path = inside(root, name, f"{where}.file_path")
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
    return c2w @ OPENGL_TO_OPENCV


def _focal(where: str, values: Mapping[str, Any], key: str, angle_key: str, size: int) -> float | None:
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


def _points(path: Path) -> torch.Tensor | None:
    """Sparse points (p, 3) of points.npz, or None without the file."""
    if not path.is_file():
        return None
    points = read_npz_array(path, "xyz")
    if points.ndim != 2 or points.shape[1] != 3 or points.dtype.kind not in "fiu" or not np.isfinite(points).all():
        raise DatasetError(f"{path}: xyz: must be finite and (n, 3); got {points.shape}; write it again or remove it")
    return torch.from_numpy(points.astype(np.float32))


def _lens_model(where: str, values: Mapping[str, Any]) -> str:
    named = values.get("camera_model")
    if named is not None and named not in _LENS_OF_MODEL:
        raise DatasetError(
            f"{where}: camera_model: {named!r} is not supported (known: {', '.join(_LENS_OF_MODEL)}); undistort the "
            "images to a pinhole camera"
        )
    if values.get("is_fisheye"):
        return "fisheye"
    return "opencv" if named is None else _LENS_OF_MODEL[named]


def _size(where: str, values: Mapping[str, Any], image: Path) -> tuple[int, int]:
    """(width, height) of the stored image, read from it when the file does not say."""
    if "w" not in values or "h" not in values:
        height, width = read_image(image).shape[:2]
        return width, height
    width, height = (_number(where, values, key, 0.0) for key in ("w", "h"))
    if width < 1 or height < 1 or width % 1 or height % 1 or max(width, height) > 1 << 16:
        raise DatasetError(f"{where}: w, h: must be positive whole numbers; got {width}, {height}; correct them")
    return int(width), int(height)


def _lens(where: str, values: Mapping[str, Any], image: Path) -> Lens:
    """The stored camera with its distortion."""
    width, height = _size(where, values, image)
    fx = _focal(where, values, "fl_x", "camera_angle_x", width)
    fy = _focal(where, values, "fl_y", "camera_angle_y", height)
    fx, fy = fx or fy, fy or fx
    if fx is None or fy is None:
        raise DatasetError(f"{where}: fl_x: missing, and so is camera_angle_x; add one of them")
    cx, cy = _number(where, values, "cx", width / 2), _number(where, values, "cy", height / 2)
    camera, model = Camera(width, height, fx, fy, cx, cy), _lens_model(where, values)
    coefficients = tuple(_number(where, values, key, 0.0) for key in _COEFFICIENTS.get(model, ()))
    lens = Lens(camera, model, coefficients)
    return Lens(camera) if lens.is_pinhole else lens


def _frames(path: Path, content: dict[str, Any]) -> list[Frame]:
    """All frames in natural order of their names; a frame's own intrinsics go before those of the file."""
    raw = content.get("frames")
    if not isinstance(raw, list) or not raw:
        raise DatasetError(f"{path}: frames: must be a list of at least one frame; got {str(raw)[:40]}; add the views")
    root = path.parent.resolve()
    frames, lenses = [], {}
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
        own = {key: value for key, value in frame.items() if key in _INTRINSICS}
        key = json.dumps(own, sort_keys=True, default=str)
        if key not in lenses:
            lenses[key] = _lens(where if own else str(path), {**content, **own}, image)
        name = image.relative_to(root).as_posix()
        frames.append(Frame(name, image, _pose(where, frame.get("transform_matrix")), lenses[key]))
    return sorted(frames, key=lambda frame: natural_order(frame.name))


def _undo_applied_transform(path: Path, content: dict[str, Any], frames: list[Frame]) -> list[Frame]:
    """Poses in the world before nerfstudio's `applied_transform` (3x4, rigid up to axes)."""
    if "applied_transform" not in content:
        return frames
    try:
        applied = torch.eye(4, dtype=torch.float64)
        applied[:3] = torch.tensor(content["applied_transform"], dtype=torch.float64)[:3]
        inverse = torch.linalg.inv(applied)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"{path}: applied_transform: must be an invertible 3x4 matrix; correct or remove it"
        ) from error
    moved = []
    for frame in frames:
        c2w = inverse @ frame.c2w
        defect = rigid_defect(c2w)
        if defect:
            raise DatasetError(
                f"{path}: applied_transform: undone it leaves a pose that {defect}; correct or remove it"
            )
        moved.append(Frame(frame.name, frame.path, c2w, frame.lens))
    return moved


def parse_transforms_json(path: Path, original_frame: bool = False) -> Capture:
    """Read a capture.

    Args:
        path: the folder with transforms.json, or a JSON file of that format.
        original_frame: undo nerfstudio's `applied_transform`, to get the world of the model it was made of.
    Raises:
        DatasetError: damaged or inconsistent input, with file, field, value and mend.
    """
    path = path / "transforms.json" if path.is_dir() else path
    content = _read_json(path)
    try:
        frames = _frames(path, content)
    except ConfigError as error:  # a camera that cannot be
        raise DatasetError(f"{path}: {error}; correct the calibration") from error
    split_path = path.with_name("split.json")
    return Capture(
        name=path.parent.resolve().name,
        source=path,
        frames=_undo_applied_transform(path, content, frames) if original_frame else frames,
        is_metric=str(content.get("units", "")).strip().lower() in _METRES,
        lists=_read_json(split_path) if split_path.is_file() else None,
        lists_source=split_path if split_path.is_file() else None,
        points=_points(path.with_name("points.npz")),
    )


def _recognises(path: Path) -> bool:
    return (path / "transforms.json").is_file() or (path.suffix == ".json" and path.is_file())


register_parser(
    "transforms_json", Parser(_recognises, parse_transforms_json, "a folder with transforms.json, or that file")
)


def _intrinsics(lens: Lens) -> dict[str, Any]:
    camera = lens.camera
    values: dict[str, Any] = {"w": camera.width, "h": camera.height, "fl_x": camera.fx, "fl_y": camera.fy}
    values |= {"cx": camera.cx, "cy": camera.cy}
    if lens.is_pinhole:
        return values | {"camera_model": "PINHOLE"}
    if lens.model not in _COEFFICIENTS:
        raise DatasetError(f"lens model {lens.model}: transforms.json has no such model; undistort the images first")
    model = {"opencv": "OPENCV", "fisheye": "OPENCV_FISHEYE"}[lens.model]
    return values | {"camera_model": model} | dict(zip(_COEFFICIENTS[lens.model], lens.coefficients, strict=False))


def write_transforms_json(folder: Path, capture: Capture, file_paths: Mapping[str, str]) -> Path:
    """Write transforms.json, and split.json and points.npz where the capture has them; no image is touched.

    Args:
        folder: an existing folder.
        capture: what to write.
        file_paths: frame name -> its image relative to `folder`.
    Returns:
        The path of transforms.json. Reading it gives the same poses and cameras.
    Raises:
        DatasetError: a lens that the format cannot express.
    """
    lenses = {frame.lens for frame in capture.frames}
    shared = _intrinsics(capture.frames[0].lens) if len(lenses) == 1 else {}
    frames = [
        {
            "file_path": file_paths[frame.name],
            **({} if shared else _intrinsics(frame.lens)),
            "transform_matrix": (frame.c2w @ OPENGL_TO_OPENCV).tolist(),
        }
        for frame in capture.frames
    ]
    content = {**shared, **({"units": "metres"} if capture.is_metric else {}), "frames": frames}
    if capture.points is not None:
        np.savez_compressed(folder / "points.npz", xyz=capture.points.numpy())
    if capture.lists is not None:
        stems = {PurePosixPath(name).with_suffix("").as_posix(): path for name, path in file_paths.items()}
        listed = {**stems, **file_paths}
        lists = {
            key: [listed[name] for name in capture.lists.get(key, [])]
            for key in ("train", "val", "test")
            if key in capture.lists
        }
        rule = {"rule": capture.lists["rule"]} if "rule" in capture.lists else {}
        write_text(folder / "split.json", json.dumps(rule | lists, indent=1) + "\n")
    write_text(folder / "transforms.json", json.dumps(content, indent=1) + "\n")
    return folder / "transforms.json"
