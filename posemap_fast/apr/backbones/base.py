"""What every APR backbone gives: taps for the feature branch, a local map and one final map for the pose head.

Contract (checked for each registered name by `tests/apr/test_backbones.py`):
    factory   `BACKBONES.get(name)(weights)`, `weights` a source as in `weights.py`, or None in silence.
    forward   images (B, 3, H, W) float in [0, 1] -> `BackboneOutput`; the input is normalised inside.
    taps      one tensor per level, shallow to deep, (B, tap_channels[i], about H / tap_strides[i], ...),
              taken *before* the ReLU that follows it (as DFNet, arXiv:2204.00559, section 3.3).
    local     (B, local_channels, about H / 8, about W / 8), after its ReLU: what is seen where, for PoseMaps.
    final     (B, out_channels, about H / out_stride, about W / out_stride), after the last ReLU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.registry import Registry

__all__ = ["BACKBONES", "Backbone", "BackboneOutput"]

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneOutput:
    """Taps (before their ReLU, shallow to deep; empty when not asked for), the map at stride 8 and the final map."""

    taps: list[torch.Tensor]
    local: torch.Tensor
    final: torch.Tensor


class Backbone(nn.Module, ABC):
    """Base of the backbones: the facts about the maps, the input check and the normalisation.

    Attributes:
        tap_channels, tap_strides: per level, shallow to deep.
        local_channels: of the map at stride 8.
        out_channels, out_stride: of the final map.
        min_size: smallest height and width in pixels that leaves at least one final cell.
    """

    tap_channels: tuple[int, ...]
    tap_strides: tuple[int, ...]
    local_channels: int
    out_channels: int
    out_stride: int
    min_size: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        # Not in the state dict: its keys stay those of the published checkpoints.
        self.register_buffer("mean", torch.tensor(_IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1] -> zero mean and unit variance per channel under ImageNet's statistics.

        Raises:
            ShapeError: not (B, 3, H, W) float, or smaller than the backbone can reduce.
        """
        where = type(self).__name__
        expect_shape(where, "images", images, (None, 3, None, None))
        if not images.is_floating_point():
            raise ShapeError(f"{where}: images must be float in [0, 1]; got {images.dtype}: divide by 255 first")
        if min(images.shape[-2:]) < self.min_size:
            size = tuple(images.shape[-2:])
            raise ShapeError(f"{where}: images must be at least {self.min_size} pixels high and wide; got {size}")
        return (images - self.mean) / self.std

    @abstractmethod
    def forward(self, images: torch.Tensor, with_taps: bool = True) -> BackboneOutput:
        """See the contract of this module; without taps their memory is not held."""


BACKBONES: Registry[Callable[[str | None], Backbone]] = Registry("apr backbone")
