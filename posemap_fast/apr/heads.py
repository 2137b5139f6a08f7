"""Pose heads: the backbone's final map -> 12-vector in the normalised pose frame.

Contract: `HEADS.get(name)(in_channels, options)`; forward (B, in_channels, h, w) -> (B, 12) for any h, w >= 1;
the attribute `output` is the last linear layer, whose bias is set to the mean training pose.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.errors import ConfigError
from posemap_fast.registry import Registry

__all__ = ["HEADS", "GapLinear", "GridMLP", "HeadOptions", "PoseHead"]

_POSE_SIZE = 12
_SPREAD_HIDDEN = 32
_FIRST_PREDICTION_STD = 0.01  # of the output weights: the first predictions lie close to the bias


@dataclass(frozen=True)
class HeadOptions:
    """Sizes of the heads that have any (`gap_linear` has none)."""

    channels: int = 32  # of the map that `grid_mlp` keeps, >= 1; of `attention`'s tokens, divisible by 8
    grid: tuple[int, int] = (4, 5)  # rows, columns of `grid_mlp`'s fixed grid; 4x5 suits 4:3 images
    hidden: int = 256  # width of `grid_mlp`'s hidden layer and of `attention`'s feed-forward part, >= 1
    layers: int = 2  # transformer layers of `attention`, >= 1

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or min(self.channels, self.hidden, self.layers, *self.grid) < 1:
            raise ConfigError(f"head options: channels, hidden, layers and both sides of grid must be >= 1; got {self}")


class PoseHead(nn.Module, ABC):
    """Base of the heads: what is read off their features, the pose and how sure it is.

    Args:
        width: of the features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, _POSE_SIZE)
        nn.init.normal_(self.output.weight, std=_FIRST_PREDICTION_STD)
        self.spread = nn.Sequential(nn.Linear(width, _SPREAD_HIDDEN), nn.ReLU(), nn.Linear(_SPREAD_HIDDEN, 2))

    @abstractmethod
    def features(self, final: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, width), for any h, w >= 1."""

    def forward(self, final: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, 12)."""
        return self.output(self.features(final))

    def log_sigma(self, features: torch.Tensor) -> torch.Tensor:
        """(B, 2) logarithm of the expected error: translation in units of the pose frame, rotation in radians.

        It reads the features and does not shape them (they are detached): the pose is what it would be without.
        """
        return self.spread(features.detach())

    def start_at(self, vector12: torch.Tensor) -> None:
        """Set the bias, hence about the first prediction, to `vector12` (12,)."""
        with torch.no_grad():
            self.output.bias.copy_(vector12)


HEADS: Registry[Callable[[int, HeadOptions], PoseHead]] = Registry("apr head")


@HEADS.register("gap_linear")
class GapLinear(PoseHead):
    """Global average pool and one linear layer, as PoseMap and DFNet; forgets where a feature was seen."""

    def __init__(self, in_channels: int, options: HeadOptions | None = None) -> None:
        super().__init__(in_channels)

    def features(self, final: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, in_channels)."""
        return final.mean(dim=(2, 3))


@HEADS.register("grid_mlp")
class GridMLP(PoseHead):
    """1x1 convolution, average over the cells of a fixed grid, two linear layers.

    Keeps *where* features were seen, which carries the pose; the grid makes it independent of the image size.
    """

    def __init__(self, in_channels: int, options: HeadOptions | None = None) -> None:
        options = options or HeadOptions()
        super().__init__(options.hidden)
        self.grid = options.grid
        self.squeeze = nn.Conv2d(in_channels, options.channels, 1)
        self.hidden = nn.Linear(options.channels * options.grid[0] * options.grid[1], options.hidden)

    def features(self, final: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, options.hidden)."""
        cells = functional.adaptive_avg_pool2d(functional.relu(self.squeeze(final)), self.grid)
        return functional.relu(self.hidden(cells.flatten(1)))
