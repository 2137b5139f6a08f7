"""What the renderer needs of a radiance field, and the registry of backbones that provide it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from posemap_fast.errors import ConfigError
from posemap_fast.registry import Registry

__all__ = ["FIELD_BACKBONES", "Field", "FieldConfig", "FieldFeatures"]


@dataclass(frozen=True)
class FieldConfig:
    """Size of the hash grid and of the heads (DESIGN section 5; Müller et al. 2022, arXiv:2201.05989)."""

    backbone: str = "native"  # a name in FIELD_BACKBONES, each reads the maps of all, or auto
    n_levels: int = 16  # resolutions of the hash grid
    n_features_per_level: int = 2  # 1, 2, 4 or 8
    log2_hashmap_size: int = 19  # entries per level, log2
    base_resolution: int = 16  # cells per side of the coarsest level
    finest_resolution: int = 0  # cells per side of the finest level; 0 = from the scene's pixel footprint
    hidden: int = 64  # width of the density and colour MLPs
    geo_features: int = 15  # outputs of the density MLP beside the density
    sh_degree: int = 4  # spherical harmonics of the view direction, 1..4
    appearance_dim: int = 16  # appearance code per image; 0 switches it off (even light, fixed exposure)
    transient_dim: int = 0  # transient code per image (NeRF-H: 20), see `TransientHead`; 0 = off
    pose_branch: Literal["position", "features", "nerf"] = "position"  # what a PoseMap is made of, see `HashField`
    pose_octaves: int = 0  # octaves of the position's encoding; 0 = two, and one more per cascade of the grid
    pose_hidden: int = 64  # composited width of the pose branch
    pose_features: int = 256  # channels of the PoseMap (paper, section 3.2)
    init_density: float = 10.0  # density of the untrained field, 1/unit: fog that keeps every cell occupied

    def __post_init__(self) -> None:
        if self.n_features_per_level not in (1, 2, 4, 8):
            raise ConfigError(f"n_features_per_level must be 1, 2, 4 or 8; got {self.n_features_per_level}")
        if not 1 <= self.sh_degree <= 4:
            raise ConfigError(f"sh_degree must be 1 to 4; got {self.sh_degree}")
        if not 10 <= self.log2_hashmap_size <= 24:
            raise ConfigError(f"log2_hashmap_size must be 10 to 24; got {self.log2_hashmap_size}")
        if self.transient_dim < 0:
            raise ConfigError(f"transient_dim must be >= 0; got {self.transient_dim}")
        if self.init_density <= 0:
            raise ConfigError(f"init_density must be > 0; got {self.init_density}")
        if not 0 <= self.pose_octaves <= 10:
            raise ConfigError(f"pose_octaves must be 0 to 10; got {self.pose_octaves}")

    @property
    def posemap_channels(self) -> int:
        """Channels of a PoseMap: `pose_features`, or as many as the field has features where those are used raw."""
        if self.pose_branch == "nerf":
            return self.n_levels * self.n_features_per_level + 1 + self.geo_features
        return self.pose_features


class FieldFeatures(NamedTuple):
    """What `density` hands to the heads, so that nothing is encoded twice."""

    encoding: torch.Tensor  # (n, n_levels * n_features_per_level) hash features
    geo: torch.Tensor  # (n, 1 + geo_features) output of the density MLP

    def select(self, indices: torch.Tensor) -> FieldFeatures:
        """The rows `indices`; the encoding keeps its level-major storage."""
        return FieldFeatures(self.encoding.T[:, indices].T, self.geo[indices])


@runtime_checkable
class Field(Protocol):
    """A radiance field over the unit cube, differentiable in `x` as well as in its parameters."""

    config: FieldConfig

    def density(self, x: torch.Tensor) -> tuple[torch.Tensor, FieldFeatures]:
        """(n, 3) positions in [0,1]^3 -> (n,) density in 1/unit of the cube, and the features of the heads."""
        ...

    def rgb(
        self,
        features: FieldFeatures,
        rays_d: torch.Tensor,
        appearance: torch.Tensor | None,
        ray_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Colour in (0, 1), (n, 3), from `rays_d` (n_rays, 3) and `appearance` (n_rays, dim) of the samples' rays.

        `ray_indices` (n,) is sorted: packed samples are, and backbones may rely on it.
        """
        ...

    def radiance(
        self, x: torch.Tensor, rays_d: torch.Tensor, appearance: torch.Tensor | None, ray_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, FieldFeatures]:
        """`density` at `x` and `rgb` there: (n,), (n, 3) and the features, for when both are wanted."""
        ...

    def pose_hidden(self, x: torch.Tensor, features: FieldFeatures) -> torch.Tensor:
        """Hidden pose feature h_i of each sample, (n, pose_hidden), before the deferred projection."""
        ...

    def grid_parameters(self) -> list[nn.Parameter]:
        """The hash table(s): large, sparse gradients, a learning rate of their own."""
        ...

    def pose_parameters(self) -> list[nn.Parameter]:
        """The pose branch: trained in stage 2, while everything else is frozen."""
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...


FIELD_BACKBONES: Registry[Callable[[FieldConfig], Field]] = Registry("field backbone")
