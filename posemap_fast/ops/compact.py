"""Selection of packed samples: drops what lies behind opaque matter before the expensive heads are evaluated.

Native code: `cuda_ext/compact`. Oracle and fallback: `posemap_fast.ops.reference.compact`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from posemap_fast.errors import ShapeError
from posemap_fast.ops._faces import face_of
from posemap_fast.ops._register import define_op
from posemap_fast.ops.composite import check_ray_offsets, check_samples
from posemap_fast.ops.reference import compact as reference

__all__ = ["CompactResult", "compact"]


class CompactResult(NamedTuple):
    """Kept samples, still packed: `sigmas[indices]` goes with `ray_offsets`."""

    indices: torch.Tensor  # (k,) int64, increasing
    ray_offsets: torch.Tensor  # (n + 1,) int64, from 0 to k


def compact(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_offsets: torch.Tensor,
    transmittance_eps: float = 1e-3,
    alpha_eps: float = 0.0,
) -> CompactResult:
    """Keep sample i when T_i >= transmittance_eps and alpha_i = 1 - exp(-sigma_i delta_i) >= alpha_eps.

    Convention: packed samples as in `composite`; T_i, before sample i, counts all samples in front of it, also those
    that are dropped for their small alpha. A NaN density is kept, and so is what lies behind it, so that it is seen.
    Args:
        sigmas: (m,) float32/64, density per unit of t, >= 0.
        t_starts, t_ends: (m,) same dtype, distance along the ray.
        ray_offsets: (n + 1,) int64 from 0 to m, not decreasing.
        transmittance_eps, alpha_eps: thresholds in [0, 1]; 0 keeps everything.
    Returns:
        CompactResult; the order of samples and rays is unchanged.
    Raises:
        ShapeError: as `composite`; or sigmas or distances require grad while gradients are recorded.
    Not differentiable: call it under `torch.no_grad()` or on detached tensors. Cost: two passes over the samples and
    one host sync for k. Reference: `ops.reference.compact`.
    Example: one ray, sigmas = [0, 9, 9, 9], unit steps  ->  indices [0, 1], ray_offsets [0, 2]
    """
    check_samples("compact", sigmas, t_starts, t_ends, ray_offsets)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (sigmas, t_starts, t_ends)):
        raise ShapeError("compact: a selection has no gradient; call it under torch.no_grad() or detach its inputs")
    indices, offsets = _compact_op(sigmas, t_starts, t_ends, ray_offsets, float(transmittance_eps), float(alpha_eps))
    return CompactResult(indices, offsets)


def _compact(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_offsets: torch.Tensor,
    transmittance_eps: float,
    alpha_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_ray_offsets("compact", ray_offsets, len(sigmas))
    face = face_of(sigmas)
    if face is None:
        return reference.compact(sigmas, t_starts, t_ends, ray_offsets, transmittance_eps, alpha_eps)
    samples = [t.contiguous() for t in (sigmas, t_starts, t_ends)]
    offsets = ray_offsets.contiguous()
    sizes = (len(offsets) - 1, len(sigmas))
    mask = sigmas.new_empty(len(sigmas), dtype=torch.uint8)
    kept_offsets = torch.empty_like(offsets)
    scratch = face.scratch("scan_scratch", sigmas, sizes[0])
    thresholds = (transmittance_eps, alpha_eps)
    face.call("compact_count", sigmas, *samples, offsets, mask, kept_offsets, *sizes, *thresholds, *scratch)
    indices = offsets.new_empty(int(kept_offsets[-1]))
    face.run(f"pmf_compact_fill_{face.device}", sigmas, offsets, mask, kept_offsets, indices, *sizes)
    return indices, kept_offsets


def _compact_fake(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    ray_offsets: torch.Tensor,
    transmittance_eps: float,
    alpha_eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    n_kept = torch.library.get_ctx().new_dynamic_size()
    return ray_offsets.new_empty(n_kept), ray_offsets.new_empty(ray_offsets.shape)


_compact_op = define_op(
    "compact(Tensor sigmas, Tensor t_starts, Tensor t_ends, Tensor ray_offsets, float transmittance_eps, "
    "float alpha_eps) -> (Tensor, Tensor)",
    _compact,
    _compact_fake,
)
