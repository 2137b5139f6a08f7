"""Absolute pose regression: backbones, heads, the network, the frame it regresses in, image augmentation."""

from __future__ import annotations

from posemap_fast.apr.aprnet import APRConfig, APRNet, APROutput, build_aprnet
from posemap_fast.apr.attention_head import Attention
from posemap_fast.apr.augment import AugmentConfig, augment_images
from posemap_fast.apr.backbones import BACKBONES, Backbone, BackboneOutput
from posemap_fast.apr.heads import HEADS, HeadOptions
from posemap_fast.apr.pose_frame import PoseFrame
from posemap_fast.apr.pose_solver import SolvedPose, solve_pose
from posemap_fast.apr.posemap_refiner import PoseMapReadout, PoseMapRefiner, RefinedPose
from posemap_fast.apr.winograd import WinogradConv2d, use_winograd

__all__ = [
    "BACKBONES",
    "HEADS",
    "APRConfig",
    "APRNet",
    "APROutput",
    "Attention",
    "AugmentConfig",
    "Backbone",
    "BackboneOutput",
    "HeadOptions",
    "PoseFrame",
    "PoseMapReadout",
    "PoseMapRefiner",
    "RefinedPose",
    "SolvedPose",
    "WinogradConv2d",
    "augment_images",
    "build_aprnet",
    "solve_pose",
    "use_winograd",
]
