"""SceneFrame: the similarity between a dataset's world and the unit cube in which the field lives.

    x_field = scale * R @ x_world + offset

Convention: the whole cube [0, 1]^3 is the outermost occupancy cascade; cascade k of K covers the cube centred at 0.5
with side 2^(k - (K - 1)), so cascade 0 is the inner box. A length in the world is a field length divided by `scale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from posemap_fast.errors import ConfigError

__all__ = ["SceneFrame"]


def _identity() -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)


def _unit_box() -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class SceneFrame:
    """World-to-field similarity, kept in float64 and applied in the dtype and on the device of its argument.

    Raises:
        ConfigError: scale not positive, rotation not a rotation, or an empty box.
    """

    scale: float  # field units per world unit, > 0
    rotation: torch.Tensor = field(default_factory=_identity)  # (3, 3) world to field axes
    offset: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))  # (3,) field units
    n_cascades: int = 1  # >= 1
    aabb: torch.Tensor = field(default_factory=_unit_box)  # (2, 3) [min, max] of the content, field units
    _moved: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("rotation", "offset", "aabb"):
            value = torch.as_tensor(getattr(self, name)).detach().to("cpu", torch.float64)
            object.__setattr__(self, name, value)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"scene frame: scale must be positive and finite; got {self.scale}")
        if self.n_cascades < 1:
            raise ConfigError(f"scene frame: n_cascades must be at least 1; got {self.n_cascades}")
        rotation = self.rotation
        if (rotation @ rotation.T - _identity()).abs().max() > 1e-6 or torch.linalg.det(rotation) < 0:
            raise ConfigError(f"scene frame: rotation must be a rotation matrix; got {rotation.tolist()}")
        if self.aabb.shape != (2, 3) or bool((self.aabb[1] <= self.aabb[0]).any()):
            raise ConfigError(f"scene frame: aabb must be (2, 3) with min < max; got {self.aabb.tolist()}")

    def _on(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation and offset in the dtype and on the device of `like`, kept so that a GPU copies them once."""
        key = (like.device, like.dtype)
        if key not in self._moved:
            self._moved[key] = (self.rotation.to(like), self.offset.to(like))
        return self._moved[key]

    def to_field(self, points: torch.Tensor) -> torch.Tensor:
        """World points (..., 3) -> field points (..., 3). Differentiable."""
        rotation, offset = self._on(points)
        return self.scale * (points @ rotation.T) + offset

    def to_world(self, points: torch.Tensor) -> torch.Tensor:
        """Field points (..., 3) -> world points (..., 3). Differentiable; inverse of `to_field`."""
        rotation, offset = self._on(points)
        return ((points - offset) / self.scale) @ rotation

    def directions(self, directions: torch.Tensor) -> torch.Tensor:
        """Rotate world directions (..., 3) into the field's axes; the length stays. Differentiable."""
        return directions @ self._on(directions)[0].T

    def directions_to_world(self, directions: torch.Tensor) -> torch.Tensor:
        """Rotate field directions (..., 3) into the world's axes; the length stays. Differentiable."""
        return directions @ self._on(directions)[0]

    def length_to_field(self, length: torch.Tensor | float) -> torch.Tensor | float:
        """Lengths in world units -> field units."""
        return length * self.scale

    def length_to_world(self, length: torch.Tensor | float) -> torch.Tensor | float:
        """Lengths in field units -> world units."""
        return length / self.scale

    def cascade_box(self, cascade: int) -> torch.Tensor:
        """(2, 3) field box of one occupancy cascade."""
        if not 0 <= cascade < self.n_cascades:
            raise ConfigError(f"scene frame: cascade must be in [0, {self.n_cascades}); got {cascade}")
        half = 0.5 * 2.0 ** (cascade - (self.n_cascades - 1))
        return torch.tensor([[0.5 - half] * 3, [0.5 + half] * 3], dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; `from_dict` reverses it exactly."""
        return {
            "scale": self.scale,
            "rotation": self.rotation.tolist(),
            "offset": self.offset.tolist(),
            "n_cascades": self.n_cascades,
            "aabb": self.aabb.tolist(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SceneFrame:
        """The frame stored by `to_dict`."""
        tensors = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("rotation", "offset", "aabb")}
        return cls(scale=float(values["scale"]), n_cascades=int(values["n_cascades"]), **tensors)
