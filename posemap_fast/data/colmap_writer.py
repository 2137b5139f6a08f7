"""Writing a capture as a COLMAP model in text form, without 2D points: COLMAP and what reads its models take it.

Convention: world-to-camera quaternion (w first) and translation; numbers are written so that reading gives the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from posemap_fast.data.capture import Capture
from posemap_fast.data.colmap_cameras import parameters_of
from posemap_fast.errors import DatasetError
from posemap_fast.files import write_text
from posemap_fast.geometry import Lens, invert_c2w, quaternion_from_matrix

__all__ = ["write_colmap_text"]

_CAMERAS = "# Camera list with one line of data per camera:\n#   CAMERA_ID, MODEL, WIDTH, HEIGHT, PARAMS[]\n"
_IMAGES = """\
# Image list with two lines of data per image:
#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME
#   POINTS2D[] as (X, Y, POINT3D_ID)
"""
_POINTS = """\
# 3D point list with one line of data per point:
#   POINT3D_ID, X, Y, Z, R, G, B, ERROR, TRACK[] as (IMAGE_ID, POINT2D_IDX)
"""


def _numbers(values: Iterable[float]) -> str:
    return " ".join(map(repr, values))


def _camera_line(camera_id: int, lens: Lens) -> str:
    model, parameters = parameters_of(lens)
    return f"{camera_id} {model} {lens.camera.width} {lens.camera.height} {_numbers(parameters)}\n"


def _image_lines(image_id: int, c2w: torch.Tensor, camera_id: int, name: str) -> str:
    if name.split() != [name]:
        raise DatasetError(f"image name {name!r}: COLMAP's text form ends a name at a space; rename the image file")
    w2c = invert_c2w(c2w)
    pose = [*quaternion_from_matrix(w2c[:3, :3]).tolist(), *w2c[:3, 3].tolist()]
    return f"{image_id} {_numbers(pose)} {camera_id} {name}\n\n"


def write_colmap_text(folder: Path, capture: Capture, file_names: Mapping[str, str]) -> None:
    """Write cameras.txt, images.txt (no 2D points) and points3D.txt (no colours, errors and tracks).

    Args:
        folder: an existing folder.
        capture: what to write; a split, the unit and what was skipped have no place in the format.
        file_names: frame name -> its image relative to the folder that COLMAP will be given as image path.
    Raises:
        DatasetError: a lens that COLMAP does not have, or a name with a space in it.
    """
    camera_ids: dict[Lens, int] = {}
    for frame in capture.frames:
        camera_ids.setdefault(frame.lens, len(camera_ids) + 1)
    cameras = [_camera_line(camera_id, lens) for lens, camera_id in camera_ids.items()]
    images = [
        _image_lines(index, frame.c2w, camera_ids[frame.lens], file_names[frame.name])
        for index, frame in enumerate(capture.frames, start=1)
    ]
    points = [] if capture.points is None else capture.points.double().tolist()
    lines = [f"{index} {_numbers(xyz)} 0 0 0 0\n" for index, xyz in enumerate(points, start=1)]
    write_text(folder / "cameras.txt", _CAMERAS + "".join(cameras))
    write_text(folder / "images.txt", _IMAGES + "".join(images))
    write_text(folder / "points3D.txt", _POINTS + "".join(lines))
