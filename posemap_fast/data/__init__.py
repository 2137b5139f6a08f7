"""Scenes: the procedural room, captures in folders, splits and the automatic frame."""

from __future__ import annotations

from posemap_fast.data.auto_frame import FrameEstimate, estimate_frame
from posemap_fast.data.room import load_room
from posemap_fast.data.scene import DATASETS, SPLIT_NAMES, DatasetKind, Scene, load_scene
from posemap_fast.data.splits import BlockRule, block_split
from posemap_fast.data.transforms_json import load_transforms_json

__all__ = [
    "DATASETS",
    "SPLIT_NAMES",
    "BlockRule",
    "DatasetKind",
    "FrameEstimate",
    "Scene",
    "block_split",
    "estimate_frame",
    "load_room",
    "load_scene",
    "load_transforms_json",
]
