"""The frame in which the network regresses: rotation as it is, translation centred and (if asked) scaled.

    target12 = row-major [R | (t - center) / scale]

With `scale` 1 a unit is one metre (the paper); with the spread of the training positions, translation and
rotation entries have the same order of magnitude in a dolls' house and in a cathedral.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.geometry import c2w_from_vector12, make_c2w, pose_vector12

__all__ = ["PoseFrame"]

_NO_SPREAD = 1e-6  # world units; training cameras closer than this stand on one spot


@dataclass(frozen=True)
class PoseFrame:
    """Similarity between camera-to-world poses and the network's 12-vectors.

    Attributes:
        center: mean camera centre of the training views, world units.
        scale: world units per unit of regressed translation, > 0.
    """

    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.center) != 3 or not all(math.isfinite(value) for value in self.center):
            raise ShapeError(f"PoseFrame: center must be 3 finite numbers; got {self.center}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ShapeError(f"PoseFrame: scale must be finite and > 0; got {self.scale}")

    @classmethod
    def from_poses(cls, c2w: torch.Tensor, scale: float | str = 1.0) -> PoseFrame:
        """Frame of the training poses (n, 4, 4), n > 0.

        Args:
            scale: a number, or 'auto': root mean square distance of the cameras to their centre
                (1 when they all stand on one spot).
        Raises:
            ConfigError: `scale` is neither.
        """
        expect_shape("PoseFrame.from_poses", "c2w", c2w, (None, 4, 4))
        if c2w.shape[0] == 0:
            raise ShapeError("PoseFrame.from_poses: c2w must hold at least one pose; got (0, 4, 4)")
        positions = c2w[:, :3, 3].double()
        center = positions.mean(0)
        x, y, z = center.tolist()
        if isinstance(scale, str):
            if scale != "auto":
                raise ConfigError(f"pose scale must be a number > 0 or 'auto'; got '{scale}'")
            spread = float((positions - center).square().sum(1).mean().sqrt())
            scale = spread if spread > _NO_SPREAD else 1.0
        return cls((x, y, z), float(scale))

    def encode(self, c2w: torch.Tensor) -> torch.Tensor:
        """Targets (..., 12) of poses (..., 4, 4); computed in the dtype of `c2w`."""
        return pose_vector12(make_c2w(c2w[..., :3, :3], self.encode_points(c2w[..., :3, 3])))

    def encode_points(self, points: torch.Tensor) -> torch.Tensor:
        """Points (..., 3) in world units -> the frame of the regressed translations."""
        return (points - self._center(points)) / self.scale

    def decode(self, vector12: torch.Tensor) -> torch.Tensor:
        """Poses (..., 4, 4) of regressed vectors (..., 12); R is the nearest rotation. Differentiable.

        Computed in the dtype of `vector12`: decode a float64 copy where world coordinates are large.
        """
        local = c2w_from_vector12(vector12)
        return make_c2w(local[..., :3, :3], local[..., :3, 3] * self.scale + self._center(local))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready description."""
        return {"center": list(self.center), "scale": self.scale}

    @classmethod
    def from_dict(cls, description: Mapping[str, Any]) -> PoseFrame:
        """Inverse of `to_dict`."""
        x, y, z = (float(value) for value in description["center"])
        return cls((x, y, z), float(description["scale"]))

    def _center(self, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.center, dtype=like.dtype, device=like.device)
