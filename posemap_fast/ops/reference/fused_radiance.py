"""Reference of `ops.fused_radiance` in plain torch: the oracle; any float dtype, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posemap_fast.ops.reference.fused_mlp import fused_mlp

__all__ = ["fused_radiance"]


def fused_radiance(
    x: torch.Tensor,
    density_params: torch.Tensor,
    density_dims: Sequence[int],
    view: torch.Tensor,
    ray_indices: torch.Tensor,
    colour_params: torch.Tensor,
    colour_dims: Sequence[int],
    bias: float,
    max_log_density: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """sigma = exp(min(geo_0 + bias, max)) (n,), rgb = sigmoid(colour([geo, view_ray])) (n, 3), geo = density(x)."""
    geo = fused_mlp(x, density_params, density_dims)
    sigmas = torch.exp((geo[:, 0] + bias).clamp(max=max_log_density))
    return sigmas, torch.sigmoid(fused_mlp(geo, colour_params, colour_dims, view, ray_indices)), geo
