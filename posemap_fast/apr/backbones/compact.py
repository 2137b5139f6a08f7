"""A small residual network for CPUs and images of about 160x120.

Four strided 3x3 convolutions with batch norm reach stride 16; a residual block (He et al. 2016,
arXiv:1512.03385) follows each from the second on, where maps are small enough to make it cheap.
About 340 MMAC per 160x120 image, a seventeenth of VGG-16; the widths were chosen by timing on two cores.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.apr.backbones import weights as sources
from posemap_fast.apr.backbones.base import BACKBONES, Backbone, BackboneOutput

__all__ = ["Compact"]

_WIDTHS = (32, 64, 128, 256)
_LOCAL_LEVEL = 2  # stride 8


class _ConvNorm(nn.Sequential):
    """3x3 convolution and batch norm; no ReLU, so that its output can be tapped or added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, scale: float = 1.0) -> None:
        convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        norm = nn.BatchNorm2d(out_channels)
        nn.init.constant_(norm.weight, scale)
        super().__init__(convolution, norm)


class _Residual(nn.Module):
    """x -> x + f(x), before the ReLU; starts near the identity (its last scale is small)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _ConvNorm(channels, channels)
        self.second = _ConvNorm(channels, channels, scale=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(functional.relu(self.first(x)))


@BACKBONES.register("compact")
class Compact(Backbone):
    """Taps at strides 2, 4 and 16; final map (B, 256, ceil(H / 16), ceil(W / 16)), 1.9 M parameters."""

    tap_channels = (_WIDTHS[0], _WIDTHS[1], _WIDTHS[3])
    tap_strides = (2, 4, 16)
    local_channels = _WIDTHS[2]
    out_channels = _WIDTHS[3]
    out_stride = 16
    min_size = 16

    def __init__(self, weights: str | None = sources.RANDOM) -> None:
        super().__init__()
        self.reduce = nn.ModuleList(
            _ConvNorm(before, width, stride=2) for before, width in zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        )
        self.refine = nn.ModuleList(_Residual(width) for width in _WIDTHS[1:])
        sources.initialise(self, "compact", weights)

    def forward(self, images: torch.Tensor, with_taps: bool = True) -> BackboneOutput:
        """(B, 3, H, W) in [0, 1] -> three taps before their ReLU, and the last map after its ReLU."""
        x = self.normalise(images)
        maps: list[torch.Tensor] = []  # before the ReLU, strides 2, 4, 8, 16
        for level, reduce in enumerate(self.reduce):
            x = reduce(x)
            if level > 0:
                x = self.refine[level - 1](functional.relu(x))
            maps.append(x)
            x = functional.relu(x)
            if level == _LOCAL_LEVEL:
                local = x
        return BackboneOutput([maps[0], maps[1], maps[3]] if with_taps else [], local, x)
