"""Hash-grid radiance field with a colour head and a pose branch (NeRF-P on an instant-ngp backbone).

    encoding = hash(x)                         (L * F)
    geo      = MLP(encoding)                   1 hidden layer; geo[0] is the log density
    rgb      = sigmoid(MLP([geo, SH(d), a]))   2 hidden layers
    h        = the pose branch (PoseMap paper, section 3.2), one of
               position   MLP(gamma(x)), 1 hidden layer; gamma: 1, x, and sines of the lowest octaves
               features   MLP([encoding, geo]), 1 hidden layer
               nerf       [encoding, geo] as they are: the paper's NeRFMap (table 5a), nothing is learnt

Surfaces come from the density in all three. A PoseMap of smooth functions of position points home from farther away
than one of hash features, whose finest levels are noise to a displaced camera (`posemap basin` measures it).

The class is written once against a set of four functions; `native` and `reference` differ in that set only, so
a map trained with one is read by the other. Positions live in the unit cube of `SceneFrame`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from posemap_fast.fields.protocol import FieldConfig, FieldFeatures
from posemap_fast.ops import FusedField, HashGridSpec, MLPSpec, RadianceSpec, fused_render_fits

__all__ = ["FieldFunctions", "HashField"]

MAX_LOG_DENSITY = 12.0  # exp(12) = 160 000 / unit: opaque within any step; keeps exp and its gradient finite
_POSE_OCTAVES = 2


@dataclass(frozen=True)
class FieldFunctions:
    """The numerical kernels a hash field is made of."""

    hash_encode: Callable[[torch.Tensor, torch.Tensor, HashGridSpec], torch.Tensor]
    sh_encode: Callable[[torch.Tensor, int], torch.Tensor]
    fused_mlp: Callable[..., torch.Tensor]  # as `ops.fused_mlp`
    fused_radiance: Callable[..., tuple[torch.Tensor, ...]] | None = None  # as `ops.fused_radiance`; None: of fused_mlp
    fuses: bool = False  # whether inference may run in `ops.fused_render`, which rounds to half


def _init_mlp(spec: MLPSpec, generator: torch.Generator) -> torch.Tensor:
    """He-uniform weights of all layers, flattened in the layout of `fused_mlp`."""
    layers = [
        torch.empty(n_out * n_in).uniform_(-math.sqrt(6 / n_in), math.sqrt(6 / n_in), generator=generator)
        for n_in, n_out in zip(spec.dims[:-1], spec.dims[1:], strict=True)
    ]
    return torch.cat(layers)


def _encode_position(x: torch.Tensor, octaves: int) -> torch.Tensor:
    """(n, 3) in the unit cube -> (n, 4 + 6 octaves): 1, u = 2 x - 1, sin and cos of pi 2^k u; stored channel first."""
    u = 2 * x.T - 1
    rows = [torch.ones_like(u[:1]), u]
    for k in range(octaves):
        angle = math.pi * 2**k * u
        rows += [angle.sin(), angle.cos()]
    return torch.cat(rows).T


class HashField(nn.Module):
    """See the module docstring; implements the `Field` protocol."""

    def __init__(self, config: FieldConfig, functions: FieldFunctions, seed: int = 0):
        super().__init__()
        if config.finest_resolution <= 0:
            raise ValueError("finest_resolution must be resolved before a field is built")
        self.config = config
        self._functions = functions
        self.grid = HashGridSpec(
            n_levels=config.n_levels,
            n_features_per_level=config.n_features_per_level,
            log2_hashmap_size=config.log2_hashmap_size,
            base_resolution=config.base_resolution,
            finest_resolution=config.finest_resolution,
        )
        n_encoding, n_geo = self.grid.output_dim, 1 + config.geo_features
        n_view = config.sh_degree**2 + config.appearance_dim
        self.density_mlp = MLPSpec((n_encoding, config.hidden, n_geo))
        self.colour_mlp = MLPSpec((n_geo + n_view, config.hidden, config.hidden, 3))
        self.radiance_spec = RadianceSpec(
            self.density_mlp, self.colour_mlp, math.log(config.init_density), MAX_LOG_DENSITY
        )
        self.pose_mlp = self._pose_mlp(n_encoding + n_geo)
        generator = torch.Generator().manual_seed(seed)
        table = torch.empty(self.grid.n_entries, config.n_features_per_level)
        self.table = nn.Parameter(table.uniform_(-1e-4, 1e-4, generator=generator))
        self.density_params = nn.Parameter(_init_mlp(self.density_mlp, generator))
        self.colour_params = nn.Parameter(_init_mlp(self.colour_mlp, generator))
        self.pose_params = nn.Parameter(
            torch.empty(0) if self.pose_mlp is None else _init_mlp(self.pose_mlp, generator)
        )

    def _pose_mlp(self, n_features: int) -> MLPSpec | None:
        config = self.config
        if config.pose_branch == "nerf":
            return None
        if config.pose_branch == "features":
            return MLPSpec((n_features, config.pose_hidden, config.pose_hidden))
        return MLPSpec((4 + 6 * self._pose_octaves, config.pose_hidden, config.pose_hidden))

    @property
    def _pose_octaves(self) -> int:
        return self.config.pose_octaves or _POSE_OCTAVES

    def grid_parameters(self) -> list[nn.Parameter]:
        """The hash table."""
        return [self.table]

    def pose_parameters(self) -> list[nn.Parameter]:
        """The pose branch."""
        return [self.pose_params]

    def density(self, x: torch.Tensor) -> tuple[torch.Tensor, FieldFeatures]:
        """(n, 3) in the unit cube -> (n,) density in 1/unit, and the features for the heads."""
        encoding = self._functions.hash_encode(x, self.table, self.grid)
        geo = self._functions.fused_mlp(encoding, self.density_params, self.density_mlp)
        log_density = geo[:, 0] + self.radiance_spec.bias
        return torch.exp(log_density.clamp(max=MAX_LOG_DENSITY)), FieldFeatures(encoding, geo)

    def radiance(
        self, x: torch.Tensor, rays_d: torch.Tensor, appearance: torch.Tensor | None, ray_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, FieldFeatures]:
        """`density` and `rgb` of the same samples, in one pass where the functions have one."""
        if self._functions.fused_radiance is None:
            sigmas, features = self.density(x)
            return sigmas, self.rgb(features, rays_d, appearance, ray_indices), features
        encoding = self._functions.hash_encode(x, self.table, self.grid)
        view = self._view(rays_d, appearance)
        sigmas, rgb, geo = self._functions.fused_radiance(
            encoding, self.density_params, self.colour_params, view, ray_indices, self.radiance_spec
        )
        return sigmas, rgb, FieldFeatures(encoding, geo)

    def rgb(
        self,
        features: FieldFeatures,
        rays_d: torch.Tensor,
        appearance: torch.Tensor | None,
        ray_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Colour of each sample, (n, 3) in (0, 1); without `appearance` the mean one (a code of zeros)."""
        view = self._view(rays_d, appearance)
        return torch.sigmoid(
            self._functions.fused_mlp(features.geo, self.colour_params, self.colour_mlp, view, ray_indices)
        )

    def _view(self, rays_d: torch.Tensor, appearance: torch.Tensor | None) -> torch.Tensor:
        """What the colour of a ray's samples depends on beside `geo`: (n_rays, n_view)."""
        view = self._functions.sh_encode(rays_d, self.config.sh_degree)
        if self.config.appearance_dim == 0:
            return view
        if appearance is None:
            appearance = rays_d.new_zeros(rays_d.shape[0], self.config.appearance_dim)
        return torch.cat([view, appearance], dim=1)

    def pose_hidden(self, x: torch.Tensor, features: FieldFeatures) -> torch.Tensor:
        """Hidden pose feature of each sample, (n, pose_hidden); of `nerf` the features themselves."""
        if self.pose_mlp is None:
            return torch.cat([features.encoding, features.geo], dim=1)
        if self.config.pose_branch == "features":
            return self._functions.fused_mlp(features.encoding, self.pose_params, self.pose_mlp, features.geo)
        encoded = _encode_position(x, self._pose_octaves)
        return self._functions.fused_mlp(encoded, self.pose_params, self.pose_mlp)

    def fused(self, want_posemap: bool) -> FusedField | None:
        """This field as the fused inference kernel reads it; None when it must not or cannot run there."""
        if not self._functions.fuses or self.table.dtype != torch.float32:
            return None
        if want_posemap and self.config.pose_branch != "features":  # all that the kernel knows
            return None
        found = FusedField(
            grid=self.grid,
            table=self.table.detach(),
            density=self.density_params.detach().half(),
            colour=self.colour_params.detach().half(),
            pose=self.pose_params.detach().half() if want_posemap else None,
            density_spec=self.density_mlp,
            colour_spec=self.colour_mlp,
            pose_spec=self.pose_mlp if want_posemap else None,
            sh_degree=self.config.sh_degree,
            appearance_dim=self.config.appearance_dim,
            log_init_density=self.radiance_spec.bias,
            max_log_density=MAX_LOG_DENSITY,
        )
        return found if fused_render_fits(found) else None
