"""Scenes: the procedural room, captures in folders, splits and the automatic frame."""

from __future__ import annotations

from posemap_fast.data.auto_frame import FrameEstimate, estimate_frame
from posemap_fast.data.border import NO_BORDER, Border, find_border
from posemap_fast.data.cambridge import parse_cambridge, read_cambridge_poses
from posemap_fast.data.capture import PARSERS, Capture, Frame, parse_capture, scene_of
from posemap_fast.data.colmap import parse_colmap
from posemap_fast.data.colmap_writer import write_colmap_text
from posemap_fast.data.image_stack import ImageStack
from posemap_fast.data.room import load_room
from posemap_fast.data.scene import DATASETS, SPLIT_NAMES, DatasetKind, Scene, load_scene
from posemap_fast.data.seven_scenes import parse_seven_scenes, read_sfm_poses
from posemap_fast.data.splits import BlockRule, block_split
from posemap_fast.data.transforms_json import parse_transforms_json, write_transforms_json
from posemap_fast.data.tum_rgbd import parse_tum_rgbd, read_tum_poses

__all__ = [
    "DATASETS",
    "NO_BORDER",
    "PARSERS",
    "SPLIT_NAMES",
    "BlockRule",
    "Border",
    "Capture",
    "DatasetKind",
    "Frame",
    "FrameEstimate",
    "ImageStack",
    "Scene",
    "block_split",
    "estimate_frame",
    "find_border",
    "load_room",
    "load_scene",
    "parse_cambridge",
    "parse_capture",
    "parse_colmap",
    "parse_seven_scenes",
    "parse_transforms_json",
    "parse_tum_rgbd",
    "read_cambridge_poses",
    "read_sfm_poses",
    "read_tum_poses",
    "scene_of",
    "write_colmap_text",
    "write_transforms_json",
]
