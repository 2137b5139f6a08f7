"""Compositing of packed samples along rays in plain torch: the oracle, and what runs without native kernels.

    tau_i = sigma_i (t_end_i - t_start_i),  T_i = exp(-sum_{j<i} tau_j),  w_i = T_i (1 - exp(-tau_i))

(Eq. 3, Mildenhall et al. 2020, arXiv:2003.08934.) The sum inside T_i is taken per ray and in float64: one running
sum over all packed samples would lose the digits of the last rays, and one NaN would reach every ray behind it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["alpha_of", "composite", "composite_backward", "composite_packed", "ray_indices", "transmittance_before"]

Composited = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def ray_indices(ray_offsets: torch.Tensor) -> torch.Tensor:
    """(m,) int64: the ray of each packed sample."""
    counts = ray_offsets.diff()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def alpha_of(sigmas: torch.Tensor, t_starts: torch.Tensor, t_ends: torch.Tensor) -> torch.Tensor:
    """(m,) share of the light that a sample absorbs."""
    return -torch.expm1(-sigmas * (t_ends - t_starts))


def _sum_before(values: torch.Tensor, ray_offsets: torch.Tensor) -> torch.Tensor:
    """(m,) float64: sum of the values in front of each sample on its ray (a zero-padded table of rays)."""
    rays = ray_indices(ray_offsets)
    columns = torch.arange(len(rays), device=rays.device) - ray_offsets[rays]
    width = int(ray_offsets.diff().max()) if len(ray_offsets) > 1 else 0
    table = values.new_zeros(len(ray_offsets) - 1, width + 1, dtype=torch.float64)
    return table.index_put((rays, columns + 1), values.double()).cumsum(1)[rays, columns]


def _sum_behind(values: torch.Tensor, ray_offsets: torch.Tensor) -> torch.Tensor:
    """(m,) float64: sum of the values behind each sample on its ray."""
    return _sum_before(values.flip(0), len(values) - ray_offsets.flip(0)).flip(0)


def transmittance_before(
    sigmas: torch.Tensor, t_starts: torch.Tensor, t_ends: torch.Tensor, ray_offsets: torch.Tensor
) -> torch.Tensor:
    """(m,) share of the light that reaches each sample."""
    return torch.exp(-_sum_before(sigmas * (t_ends - t_starts), ray_offsets)).to(sigmas.dtype)


def _sum_per_ray(values: torch.Tensor, rays: torch.Tensor, n_rays: int) -> torch.Tensor:
    """(m, ...) -> (n_rays, ...)."""
    return values.new_zeros(n_rays, *values.shape[1:]).index_add(0, rays, values)


def composite(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
    early_stop_eps: float,
) -> Composited:
    """rgb (n, 3), depth (n,), opacity (n,), features (n, C), weights (m,); see `posemap_fast.ops.composite`."""
    rays, n_rays = ray_indices(ray_offsets), len(ray_offsets) - 1
    transmittance = transmittance_before(sigmas, t_starts, t_ends, ray_offsets)
    is_dark = transmittance.detach() < early_stop_eps
    weights = (transmittance * alpha_of(sigmas, t_starts, t_ends)).masked_fill(is_dark, 0.0)
    return (
        _sum_per_ray(weights[:, None] * rgbs, rays, n_rays),
        _sum_per_ray(weights * (t_starts + t_ends) / 2, rays, n_rays),
        _sum_per_ray(weights, rays, n_rays),
        _sum_per_ray(weights[:, None] * features, rays, n_rays),
        weights,
    )


def composite_backward(
    cotangents: Sequence[torch.Tensor | None],
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
    early_stop_eps: float,
) -> Composited:
    """Gradients of the five inputs for the cotangents of the five outputs (None where no loss reads one).

        s_i = d loss / d w_i,   d loss / d tau_i = T_{i+1} s_i - sum_{j>i} w_j s_j

    Written out because autograd cannot be relied on inside an op: where its dispatch keys are switched off (below an
    autograd kernel, in a compiled graph) nothing is recorded and every gradient would be zero without a word.
    """
    rays, inputs = ray_indices(ray_offsets), (sigmas, t_starts, t_ends, rgbs, features, ray_offsets, early_stop_eps)
    outputs = composite(*inputs)
    given = [o.new_zeros(o.shape) if c is None else c for o, c in zip(outputs, cotangents, strict=True)]
    rgb, depth, opacity, feature = (g[rays] for g in given[:4])
    weights, middle, delta = outputs[4], (t_starts + t_ends) / 2, t_ends - t_starts
    score = (rgb * rgbs).sum(1) + depth * middle + opacity + (feature * features).sum(1) + given[4]
    before = transmittance_before(sigmas, t_starts, t_ends, ray_offsets)
    behind = _sum_behind(weights * score, ray_offsets).to(sigmas.dtype)
    grad_tau = (before * torch.exp(-sigmas * delta) * score - behind).masked_fill(before < early_stop_eps, 0.0)
    along, shift = grad_tau * sigmas, weights * depth / 2
    return grad_tau * delta, shift - along, shift + along, weights[:, None] * rgb, weights[:, None] * feature


def composite_packed(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
) -> Composited:
    """The usual packed form, as a user would write it: one running sum, `index_add`; the benchmark's peer.

    No early stop. The running sum is in float64, or the last of many rays would be wrong in the third digit;
    a NaN or infinite density spoils all rays behind its own.
    """
    rays, n_rays = ray_indices(ray_offsets), len(ray_offsets) - 1
    taus = sigmas * (t_ends - t_starts)
    before = torch.nn.functional.pad(taus.cumsum(0, dtype=torch.float64), (1, 0))
    depth_before = (before[:-1] - before[ray_offsets[rays]]).to(taus.dtype)
    weights = torch.exp(-depth_before) * (1 - torch.exp(-taus))
    return (
        rgbs.new_zeros(n_rays, 3).index_add(0, rays, weights[:, None] * rgbs),
        rgbs.new_zeros(n_rays).index_add(0, rays, weights * (t_starts + t_ends) / 2),
        rgbs.new_zeros(n_rays).index_add(0, rays, weights),
        rgbs.new_zeros(n_rays, features.shape[1]).index_add(0, rays, weights[:, None] * features),
        weights,
    )
