"""Selection of packed samples that can contribute to a pixel, in plain torch."""

from __future__ import annotations

import torch

from posemap_fast.ops.reference.composite import alpha_of, ray_indices, transmittance_before

__all__ = ["compact"]


def compact(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_offsets: torch.Tensor,
    transmittance_eps: float,
    alpha_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (k,) of the kept samples and their ray_offsets (n + 1,); see `posemap_fast.ops.compact`."""
    is_dark = transmittance_before(sigmas, t_starts, t_ends, ray_offsets) < transmittance_eps
    is_clear = alpha_of(sigmas, t_starts, t_ends) < alpha_eps
    is_kept = ~(is_dark | is_clear)
    counts = torch.zeros_like(ray_offsets).index_add(0, ray_indices(ray_offsets) + 1, is_kept.long())
    return is_kept.nonzero()[:, 0], counts.cumsum(0)
