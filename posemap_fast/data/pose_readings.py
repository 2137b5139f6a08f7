"""Other readings of the same poses: the mistakes of convention that datasets and their converters really make.

A reading turns poses as loaded (OpenCV camera-to-world) into what they would be had the file meant something else. A
change of the world's axes is not among them: it moves all cameras alike and nothing in the images can tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from posemap_fast.geometry import matrix_from_quaternion, quaternion_from_matrix

__all__ = ["AS_LOADED", "readings"]

AS_LOADED = "as loaded"
_OPENGL = np.diag([1.0, -1.0, -1.0])
Parts = tuple[np.ndarray, np.ndarray]  # rotations (n, 3, 3) and column 3 (n, 3)


def _transposed(rotation: np.ndarray) -> np.ndarray:
    return rotation.transpose(0, 2, 1)


def _turned(rotation: np.ndarray, vector: np.ndarray) -> np.ndarray:
    return np.einsum("nij,nj->ni", rotation, vector)


def _inverse(rotation: np.ndarray, centre: np.ndarray) -> Parts:
    back = _transposed(rotation)
    return back, -_turned(back, centre)


def _reordered(rotation: np.ndarray, order: list[int]) -> np.ndarray:
    """Rotations whose quaternions (w, x, y, z) have the given entries of the present ones."""
    quaternion = quaternion_from_matrix(torch.from_numpy(rotation))
    return matrix_from_quaternion(quaternion[:, order]).numpy()


def _reordered_w2c(rotation: np.ndarray, centre: np.ndarray, order: list[int]) -> Parts:
    w2c, translation = _inverse(rotation, centre)
    return _inverse(_reordered(w2c, order), translation)


_LAST_READ_FIRST = [3, 0, 1, 2]  # the file has x y z w, and was read as w x y z
_FIRST_READ_LAST = [1, 2, 3, 0]

# what rotation and translation stand for; R, t as loaded
_MATRICES: dict[str, Callable[[np.ndarray, np.ndarray], Parts]] = {
    AS_LOADED: lambda r, t: (r, t),
    "camera-to-world and world-to-camera are exchanged": _inverse,
    "the rotation is transposed": lambda r, t: (_transposed(r), t),
    "the rotation is transposed before the OpenGL axes are converted": lambda r, t: (_OPENGL @ _transposed(r), t),
    "column 3 is the world-to-camera translation, not the centre": lambda r, t: (r, -_turned(r, t)),
    "the file's translation is the centre already": lambda r, t: (r, -_turned(_transposed(r), t)),
    "quaternions have the scalar last": lambda r, t: (_reordered(r, _LAST_READ_FIRST), t),
    "quaternions have the scalar first": lambda r, t: (_reordered(r, _FIRST_READ_LAST), t),
    "world-to-camera quaternions have the scalar last": lambda r, t: _reordered_w2c(r, t, _LAST_READ_FIRST),
    "world-to-camera quaternions have the scalar first": lambda r, t: _reordered_w2c(r, t, _FIRST_READ_LAST),
}
# what the camera's axes are; columns: the image's right, down and forward in the axes of the loaded camera
_AXES: dict[str, np.ndarray] = {
    AS_LOADED: np.eye(3),
    "the camera's y and z axes are flipped (OpenGL and OpenCV exchanged)": _OPENGL,
    "the camera's y axis is flipped": np.diag([1.0, -1.0, 1.0]),
    "the camera's x axis is flipped (mirrored images)": np.diag([-1.0, 1.0, 1.0]),
    "the camera's z axis is flipped": np.diag([1.0, 1.0, -1.0]),
    "the camera's x and y axes are flipped (PyTorch3D, or images upside down)": np.diag([-1.0, -1.0, 1.0]),
    "the camera's x and z axes are flipped": np.diag([-1.0, 1.0, -1.0]),
    "images are turned by 90 deg counter-clockwise": np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "images are turned by 90 deg clockwise": np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "the camera's axes are a vehicle's (x forward, y left, z up)": np.array(
        [[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]]
    ),
}


def readings(c2w: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """All readings of poses (n, 4, 4) float64, the loaded one first: name and poses (n, 4, 4), maybe reflections.

    The name completes the sentence "the poses fit when ...".
    """
    for matrix, change in _MATRICES.items():
        rotation, centre = change(c2w[:, :3, :3], c2w[:, :3, 3])
        for axes, turn in _AXES.items():
            poses = np.tile(np.eye(4), (len(c2w), 1, 1))
            poses[:, :3, :3], poses[:, :3, 3] = rotation @ turn, centre
            said = [part for part in (matrix, axes) if part != AS_LOADED]
            yield " and ".join(said) or AS_LOADED, poses
