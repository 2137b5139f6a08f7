"""Losses as pure functions; weights and schedules belong to the stages that use them."""

from __future__ import annotations

from posemap_fast.losses.distortion import distortion_loss, opacity_entropy
from posemap_fast.losses.photometric import huber, mse, nerf_in_the_wild, psnr
from posemap_fast.losses.pose import pose_l2, pose_mse
from posemap_fast.losses.posemap import posemap_cosine, posemap_l2
from posemap_fast.losses.triplet import hardest_pairing, triplet_loss
from posemap_fast.losses.uncertainty import laplace_nll

__all__ = [
    "distortion_loss",
    "hardest_pairing",
    "huber",
    "laplace_nll",
    "mse",
    "nerf_in_the_wild",
    "opacity_entropy",
    "pose_l2",
    "pose_mse",
    "posemap_cosine",
    "posemap_l2",
    "psnr",
    "triplet_loss",
]
