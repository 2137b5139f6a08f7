"""The feature branch of DFNet (arXiv:2204.00559, section 3.3): backbone taps -> comparable feature maps.

Per level: 1x1 convolution -> ReLU -> resize -> kxk convolution -> batch norm. Maps larger than the common
size are averaged down *before* the kxk convolution, which is where the cost is (43 of 46 GFLOP at 427x240
when it runs at full size); smaller ones are interpolated after it. The ReLU comes before the average, or the
zero-mean edge responses of the shallow level would cancel. With a common size of stride 1 this is DFNet's branch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["FeatureBranch"]


class FeatureBranch(nn.Module):
    """One small adapter per tap; training only, inference never runs it."""

    def __init__(self, tap_channels: Sequence[int], hidden: int, dim: int, kernel: int) -> None:
        super().__init__()
        self.squeeze = nn.ModuleList(nn.Conv2d(channels, hidden, 1) for channels in tap_channels)
        self.mix = nn.ModuleList(nn.Conv2d(hidden, dim, kernel, padding=kernel // 2) for _ in tap_channels)
        self.norm = nn.ModuleList(nn.BatchNorm2d(dim) for _ in tap_channels)

    def forward(self, taps: Sequence[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
        """Taps (B, C_l, h_l, w_l), shallow to deep -> (levels, B, dim, *size)."""
        layers = zip(taps, self.squeeze, self.mix, self.norm, strict=True)
        return torch.stack([_adapt(*level, size) for level in layers])


def _adapt(
    tap: torch.Tensor, squeeze: nn.Module, mix: nn.Module, norm: nn.Module, size: tuple[int, int]
) -> torch.Tensor:
    x = functional.relu(squeeze(tap))
    if x.shape[2] > size[0] and x.shape[3] > size[1]:
        x = functional.adaptive_avg_pool2d(x, size)
    x = norm(mix(x))
    if x.shape[2:] != size:
        x = functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return x
