"""The embedded scene `room`: traced on the spot, no download, the same on every machine for one seed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from posemap_fast.data.image_stack import ImageStack
from posemap_fast.data.room.atlas import Atlas, bake_atlas
from posemap_fast.data.room.paths import camera_path
from posemap_fast.data.room.tracer import trace_view
from posemap_fast.data.scene import DATASETS, DatasetKind, Scene
from posemap_fast.data.splits import BlockRule, block_split
from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera

__all__ = ["load_room"]

_KINECT_FOCAL = 525.505 / 640  # focal length of the 7-Scenes colour camera over its width
_VAL_BLOCK, _VAL_GAP = 4, 1  # views


def _train_and_val(n_train: int, n_val: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Poses on the training path without and with the validation blocks; the gaps beside them are not rendered."""
    n_blocks = -(-n_val // _VAL_BLOCK)
    n_path = n_train + n_val + 2 * _VAL_GAP * n_blocks
    poses = camera_path("train", n_path, seed)
    rule = BlockRule(0.0, n_val / n_path, 0, n_blocks, _VAL_BLOCK, _VAL_GAP)
    parts = block_split(n_path, rule) if n_val else {"train": list(range(n_path)), "val": []}
    return poses[parts["train"]], poses[parts["val"]]


def _render(atlas: Atlas, camera: Camera, c2w: np.ndarray, supersample: int) -> tuple[np.ndarray, np.ndarray]:
    """One view: (H, W, 3) uint8 from `supersample` squared rays per pixel, and the z-depth of the pixel centres."""
    fine = camera.resized(camera.width * supersample, camera.height * supersample)
    colours, depth = trace_view(atlas, fine, c2w)
    pooled = colours.reshape(camera.height, supersample, camera.width, supersample, 3).mean((1, 3))
    if supersample % 2 == 0:  # no ray of the fine camera passes through a pixel's centre
        depth = trace_view(atlas, camera, c2w)[1]
    else:
        depth = depth[supersample // 2 :: supersample, supersample // 2 :: supersample]
    return (pooled * 255 + 0.5).astype(np.uint8), depth


def load_room(
    spec: str = "room",
    seed: int = 0,
    n_train: int = 200,
    n_val: int = 16,
    n_test: int = 40,
    n_unlabelled: int = 24,
    width: int = 160,
    height: int = 120,
    supersample: int = 3,
) -> Scene:
    """Trace the procedural room.

    Args:
        spec: ignored; the registry passes it.
        seed: textures, shadows and phases of the camera paths; the furniture stays.
        n_train, n_val, n_test, n_unlabelled: views on the training path, cut from it, on the test and the third path.
        width, height: image size; the focal length keeps the 7-Scenes field of view across the width.
        supersample: rays per pixel and axis.
    Returns:
        A metric `Scene` with ground-truth depth. About 5 s at the defaults on 2 cores.
    Raises:
        ConfigError: a count or size out of range.
    """
    for name, value, least in (
        ("n_train", n_train, 2),
        ("n_val", n_val, 0),
        ("n_test", n_test, 1),
        ("n_unlabelled", n_unlabelled, 0),
        ("width", width, 8),
        ("height", height, 8),
        ("supersample", supersample, 1),
    ):
        if value < least:
            raise ConfigError(f"dataset room: {name} must be at least {least}; got {value}")
    focal = _KINECT_FOCAL * width
    camera = Camera(width, height, focal, focal, width / 2, height / 2)
    train, val = _train_and_val(n_train, n_val, seed)
    parts = {"train": train, "val": val, "test": camera_path("test", n_test, seed)}
    if n_unlabelled:
        parts["unlabelled"] = camera_path("unlabelled", n_unlabelled, seed)
    atlas = bake_atlas(seed)
    splits: dict[str, list[int]] = {}
    names: list[str] = []
    for key, poses in parts.items():
        splits[key] = list(range(len(names), len(names) + len(poses)))
        names += [f"{key}-{index:04d}" for index in range(len(poses))]
    c2w = torch.cat(list(parts.values()))
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        views = list(pool.map(lambda pose: _render(atlas, camera, pose, supersample), c2w.numpy()))
    return Scene(
        name="room",
        images=ImageStack(torch.from_numpy(np.stack([image for image, _ in views]))),
        names=names,
        c2w=c2w,
        camera=camera,
        splits=splits,
        is_metric=True,
        split_rule=f"train, test and unlabelled views on three different paths; validation in blocks of {_VAL_BLOCK} "
        "cut from the training path",
        depth=torch.from_numpy(np.stack([depth for _, depth in views])),
    )


DATASETS.register("room")(DatasetKind(lambda spec: spec == "room", load_room, "the word 'room'"))
