"""Regularisers of the weights along rays: distortion (no floaters, no fog) and opacity entropy (all or nothing).

Convention: packed samples; those of a ray are contiguous, do not overlap and are sorted by t.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from posemap_fast.checks import expect_shape

__all__ = ["distortion_loss", "opacity_entropy"]


def distortion_loss(
    weights: torch.Tensor, t_starts: torch.Tensor, t_ends: torch.Tensor, ray_offsets: torch.Tensor
) -> torch.Tensor:
    """Mean distortion of the rays' weight distributions (mip-NeRF 360, Barron et al. 2022, arXiv:2111.12077, Eq. 15).

        L = sum_ij w_i w_j |m_i - m_j| + 1/3 sum_i w_i^2 (t_end_i - t_start_i),   m = (t_start + t_end) / 2

    Since the samples are sorted, the double sum is 2 sum_i w_i (m_i W_i - M_i) with W_i = sum_{j<i} w_j and
    M_i = sum_{j<i} w_j m_j: O(n_samples), by prefix sums in float64 (in float32 they lose 3 digits).

    Args:
        weights, t_starts, t_ends: (n_samples,) float.
        ray_offsets: (n_rays + 1,) int64, CSR; a ray may be empty.
    Returns:
        Scalar in the dtype of `weights`, in units of t; 0 without rays.
    Differentiable in weights, t_starts and t_ends.
    Example: one ray, w = [.5, .5], t = [0, 1], [2, 3]  ->  2 * .25 * 2 + (.25 + .25) / 3 = 1.1667
    """
    n_samples = weights.shape[0]
    for name, tensor in (("weights", weights), ("t_starts", t_starts), ("t_ends", t_ends)):
        expect_shape("distortion_loss", name, tensor, (n_samples,))
    expect_shape("distortion_loss", "ray_offsets", ray_offsets, (None,))
    n_rays = ray_offsets.shape[0] - 1
    w, start, end = weights.double(), t_starts.double(), t_ends.double()
    middle = (start + end) / 2
    before = _sum_before(torch.stack([w, w * middle]), ray_offsets)  # (2, n_samples)
    pairs = 2 * (w * (middle * before[0] - before[1])).sum()
    own = (w.square() * (end - start)).sum() / 3
    return ((pairs + own) / max(n_rays, 1)).to(weights.dtype)


def _sum_before(values: torch.Tensor, ray_offsets: torch.Tensor) -> torch.Tensor:
    """Exclusive prefix sums within each ray of values (k, n_samples)."""
    total = functional.pad(values.cumsum(1), (1, 0))  # (k, n_samples + 1)
    counts = ray_offsets.diff()
    at_ray_start = total[:, ray_offsets[:-1]].repeat_interleave(counts, dim=1, output_size=values.shape[1])
    return total[:, :-1] - at_ray_start


def opacity_entropy(opacity: torch.Tensor, epsilon: float = 1e-5) -> torch.Tensor:
    """Mean binary entropy -o log o - (1 - o) log(1 - o), in nats, of ray opacities (n,) in [0, 1].

    Opacities are clamped to [epsilon, 1 - epsilon], beyond which the gradient is 0. Empty input gives 0.
    """
    o = opacity.clamp(epsilon, 1 - epsilon)
    entropy = -(o * o.log() + (1 - o) * (1 - o).log())
    return entropy.mean() if entropy.numel() else entropy.sum()
