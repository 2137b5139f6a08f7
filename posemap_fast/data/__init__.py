"""Scenes: the procedural room, captures in folders, splits and the automatic frame."""

from __future__ import annotations

from posemap_fast.data.auto_frame import FrameEstimate, estimate_frame
from posemap_fast.data.capture import PARSERS, Capture, Frame, parse_capture, scene_of
from posemap_fast.data.image_stack import ImageStack
from posemap_fast.data.room import load_room
from posemap_fast.data.scene import DATASETS, SPLIT_NAMES, DatasetKind, Scene, load_scene
from posemap_fast.data.splits import BlockRule, block_split
from posemap_fast.data.transforms_json import parse_transforms_json, write_transforms_json

__all__ = [
    "DATASETS",
    "PARSERS",
    "SPLIT_NAMES",
    "BlockRule",
    "Capture",
    "DatasetKind",
    "Frame",
    "FrameEstimate",
    "ImageStack",
    "Scene",
    "block_split",
    "estimate_frame",
    "load_room",
    "load_scene",
    "parse_capture",
    "parse_transforms_json",
    "scene_of",
    "write_transforms_json",
]
