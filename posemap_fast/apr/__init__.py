"""Absolute pose regression: backbones, heads, the network and the frame it regresses in."""

from __future__ import annotations

from posemap_fast.apr.aprnet import APRConfig, APRNet, APROutput, build_aprnet
from posemap_fast.apr.backbones import BACKBONES, Backbone, BackboneOutput
from posemap_fast.apr.heads import HEADS, HeadOptions
from posemap_fast.apr.pose_frame import PoseFrame

__all__ = [
    "BACKBONES",
    "HEADS",
    "APRConfig",
    "APRNet",
    "APROutput",
    "Backbone",
    "BackboneOutput",
    "HeadOptions",
    "PoseFrame",
    "build_aprnet",
]
