"""The head `attention`: a learnt pose token attends to the cells of the final map and is read off.

Transformers on the activation map of an absolute pose regressor as Shavit et al. 2021 (arXiv:2103.11477), with
pre-norm layers and a sinusoidal position encoding (Vaswani et al. 2017, arXiv:1706.03762) made for two axes.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from posemap_fast.apr.heads import HEADS, HeadOptions, PoseHead
from posemap_fast.errors import ConfigError

__all__ = ["Attention", "position_encoding"]

_N_HEADS = 4
_CHANNEL_UNIT = 8  # sine and cosine for two axes with two frequencies or more; also a multiple of the heads
_FREQUENCY_RATIO = 16.0  # from half a period over the whole side to 8 periods, which tell 16 cells apart
_TOKEN_STD = 0.02  # of the first pose token, as ViT (arXiv:2010.11929)


def position_encoding(height: int, width: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of the cell centres ((i + 0.5) / height, (j + 0.5) / width), which lie in [0, 1].

        e(s) = [sin(pi f_k s), cos(pi f_k s)],   f_k from 1 to 16 in geometric steps, k < channels / 4

    Positions are shares of the side, so a place in the image has about the same code at any map size.
    Args:
        channels: divisible by 8; the first half codes the row, the second the column.
        like: a tensor of the wanted device and dtype.
    Returns:
        (height * width, channels) in row-major order.
    """
    steps = torch.linspace(0, 1, channels // 4, device=like.device, dtype=torch.float32)
    frequencies = math.pi * _FREQUENCY_RATIO**steps

    def along(n: int) -> torch.Tensor:
        centres = (torch.arange(n, device=like.device, dtype=torch.float32) + 0.5) / n
        angles = centres[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, channels / 2)

    rows = along(height)[:, None].expand(-1, width, -1)
    columns = along(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1).to(like.dtype)


@HEADS.register("attention")
class Attention(PoseHead):
    """1x1 convolution to `channels` per cell, position encoding, `layers` transformer layers, the pose token.

    Keeps *where* features were seen, and lets cells weigh each other; cost grows with the square of h w.
    Uses `channels`, `layers` and `hidden` (width of the feed-forward part) of the options.
    """

    def __init__(self, in_channels: int, options: HeadOptions | None = None) -> None:
        options = options or HeadOptions()
        channels = options.channels
        if channels % _CHANNEL_UNIT:
            nearest = max(_CHANNEL_UNIT, _CHANNEL_UNIT * round(channels / _CHANNEL_UNIT))
            raise ConfigError(
                f"attention head: channels must be divisible by {_CHANNEL_UNIT}; got {channels}: set it to {nearest}"
            )
        super().__init__(channels)
        self.squeeze = nn.Conv2d(in_channels, channels, 1)
        self.token = nn.Parameter(torch.empty(1, 1, channels).normal_(std=_TOKEN_STD))
        self.layers = nn.Sequential(*(_layer(channels, options.hidden) for _ in range(options.layers)))
        self.norm = nn.LayerNorm(channels)

    def features(self, final: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, options.channels)."""
        cells = self.squeeze(final)  # (B, channels, h, w)
        _, channels, height, width = cells.shape
        tokens = cells.flatten(2).transpose(1, 2) + position_encoding(height, width, channels, like=cells)
        tokens = torch.cat([self.token.expand(len(cells), -1, -1), tokens], dim=1)  # (B, 1 + h w, channels)
        return self.norm(self.layers(tokens)[:, 0])


def _layer(channels: int, hidden: int) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(channels, _N_HEADS, hidden, dropout=0.0, batch_first=True, norm_first=True)
