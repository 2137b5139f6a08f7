"""Pose decoder: PoseMap -> pose, the other half of the pose branch's autoencoder (paper, section 3.2).

The paper flattens H x W of the map and applies MLP layers (1536, 256, 128, 12), but H/16 * W/16 is 1536 for none
of its image sizes, and flattening everything would take 150 M weights. Adaptive pooling to 2 x 3 cells of 256
channels gives exactly 1536 inputs at any resolution.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["PoseDecoder"]

_POOLED = (2, 3)  # rows, columns: 2 * 3 * 256 = 1536


class PoseDecoder(nn.Module):
    """(B, C, rows, cols) PoseMap -> (B, 12) pose vector in the normalised pose frame."""

    def __init__(self, channels: int = 256):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(_POOLED)
        self.layers = nn.Sequential(
            nn.Linear(channels * _POOLED[0] * _POOLED[1], 256),
            nn.ReLU(),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Linear(128, 12),
        )

    def forward(self, posemap: torch.Tensor) -> torch.Tensor:
        """Decode a batch of PoseMaps of any size of at least 1 x 1 cells."""
        return self.layers(self.pool(posemap).flatten(1))
