"""The pinhole camera: intrinsics travel with the image size they belong to.

Convention: pixel (i, j) covers [i, i+1) x [j, j+1) and has its centre at (i + 0.5, j + 0.5); cx, cy are measured
from the corner of the image, so a resize scales all four intrinsics without any half-pixel shift.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from posemap_fast.errors import ConfigError

__all__ = ["Camera"]


@dataclass(frozen=True)
class Camera:
    """Pinhole intrinsics in pixels of an image of `width` x `height`.

    Raises:
        ConfigError: a size below 1, a focal length that is not positive, or a value that is not finite.
    """

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float

    def __post_init__(self) -> None:
        for name in ("width", "height", "fx", "fy"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"camera: {name} must be positive and finite; got {value}")
        for name in ("cx", "cy"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"camera: {name} must be finite; got {getattr(self, name)}")

    @property
    def K(self) -> torch.Tensor:
        """(3, 3) float64 intrinsic matrix: (u, v, 1) ~ K (x, y, z)."""
        return torch.tensor([[self.fx, 0.0, self.cx], [0.0, self.fy, self.cy], [0.0, 0.0, 1.0]], dtype=torch.float64)

    def resized(self, width: int, height: int) -> Camera:
        """The camera of the same image resampled to `width` x `height`."""
        sx, sy = width / self.width, height / self.height
        return Camera(width, height, self.fx * sx, self.fy * sy, self.cx * sx, self.cy * sy)

    def pixel_grid(self) -> torch.Tensor:
        """(height * width, 2) float32 pixel centres (x, y), row by row."""
        y, x = torch.meshgrid(torch.arange(self.height), torch.arange(self.width), indexing="ij")
        return torch.stack([x, y], dim=-1).reshape(-1, 2).float() + 0.5

    def cell_centers(self, rows: int, cols: int) -> torch.Tensor:
        """(rows * cols, 2) float32 centres (x, y) of cells that tile the image evenly, row by row."""
        y = (torch.arange(rows) + 0.5) * (self.height / rows)
        x = (torch.arange(cols) + 0.5) * (self.width / cols)
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; `from_dict` reverses it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Camera:
        """The camera stored by `to_dict`."""
        return cls(**values)
