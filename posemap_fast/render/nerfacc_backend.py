"""`nerfacc`: marching and compositing on nerfacc's kernels (Li et al. 2023, arXiv:2305.04966); CUDA only, float32.

nerfacc is imported at the first call. The contracts are those of `ops.march`, `ops.compact` and `ops.composite`, with
three differences in marching that come from nerfacc's kernel:

- The last interval of a ray is cut at its exit like ours when more than half of it is inside, and left out otherwise.
- The lattice is a running sum of steps in float32: after a thousand of them it is off by a few hundredths of a step.
- With `cone_angle` > 0 empty space is crossed in steps of the length at its entry, and `step_max` is not known: behind
  a gap the samples are as dense as ours, but not the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from posemap_fast.checks import expect_dtype, expect_shape
from posemap_fast.errors import BackendError
from posemap_fast.ops import CompactResult, CompositeOutput, MarchResult, MarchSpec
from posemap_fast.ops.composite import check_samples
from posemap_fast.ops.reference.composite import ray_indices
from posemap_fast.ops.reference.march import clip_rays, step_at
from posemap_fast.optional import NERFACC
from posemap_fast.render.backends import RENDER_BACKENDS, MarchingBackend
from posemap_fast.render.nerfacc_layout import (
    binaries_of,
    finest_level,
    level_aabbs,
    offsets_of_counts,
    packed_info_of,
)

__all__ = ["NerfaccKernels"]


class _Grid(NamedTuple):
    """The occupancy bits that `binaries` were unpacked from, and the state they were in."""

    bitfield: torch.Tensor
    version: int
    binaries: torch.Tensor


class NerfaccKernels:
    """The three functions of a `MarchingBackend` on nerfacc.

    Args:
        load: gives the module nerfacc; called at the first use.
        device_type: where its kernels run.
    """

    def __init__(self, load: Callable[[], Any], device_type: str = "cuda"):
        self._load = load
        self._device_type = device_type
        self._grid: _Grid | None = None

    @functools.cached_property
    def _nerfacc(self) -> Any:
        return self._load()

    def march(
        self,
        rays_o: torch.Tensor,
        rays_d: torch.Tensor,
        near: torch.Tensor,
        far: torch.Tensor,
        aabb: torch.Tensor,
        bitfield: torch.Tensor,
        spec: MarchSpec,
        jitter: torch.Tensor | None = None,
    ) -> MarchResult:
        """As `ops.march`; see the module's docstring for the differences."""
        self._expect_usable("march", rays_o)
        expect_shape("march", "rays_d", rays_d, (len(rays_o), 3))
        expect_shape("march", "bitfield", bitfield, (spec.n_cells // 8,))
        if len(rays_o) == 0:  # nerfacc divides by the number of rays
            return MarchResult(near.new_zeros(1, dtype=torch.int64), near, near)
        with torch.no_grad():
            rays = _clean_rays(rays_o, rays_d, near, far, aabb, jitter, spec)
            level = finest_level(spec)
            intervals, samples, _ = self._nerfacc.traverse_grids(
                rays.origins,
                rays.directions,
                self._binaries(bitfield, spec)[level:],
                level_aabbs(spec, rays_o.device)[level:],
                near_planes=rays.starts,
                far_planes=rays.ends,
                step_size=spec.step_min,
                cone_angle=spec.cone_angle,
                traverse_steps_limit=spec.max_samples,
            )
            ends = intervals.vals[intervals.is_right]
            offsets = offsets_of_counts(samples.packed_info[:, 1])
            return MarchResult(
                offsets, intervals.vals[intervals.is_left], torch.minimum(ends, rays.ends[samples.ray_indices])
            )

    @torch.no_grad()
    def compact(
        self,
        sigmas: torch.Tensor,
        t_starts: torch.Tensor,
        t_ends: torch.Tensor,
        ray_offsets: torch.Tensor,
        transmittance_eps: float = 1e-3,
        alpha_eps: float = 0.0,
    ) -> CompactResult:
        """As `ops.compact`; records no gradients."""
        self._expect_usable("compact", sigmas)
        check_samples("compact", sigmas, t_starts, t_ends, ray_offsets)
        if len(sigmas) == 0:
            return CompactResult(ray_offsets[:0], ray_offsets)
        transmittance, alphas = self._nerfacc.render_transmittance_from_density(
            t_starts, t_ends, sigmas, packed_info=packed_info_of(ray_offsets)
        )
        is_kept = ~((transmittance < transmittance_eps) | (alphas < alpha_eps))  # NaN is kept
        kept_before = offsets_of_counts(is_kept)
        return CompactResult(is_kept.nonzero()[:, 0], kept_before[ray_offsets])

    def composite(
        self,
        sigmas: torch.Tensor,
        t_starts: torch.Tensor,
        t_ends: torch.Tensor,
        rgbs: torch.Tensor,
        ray_offsets: torch.Tensor,
        features: torch.Tensor | None = None,
        early_stop_eps: float = 1e-4,
    ) -> CompositeOutput:
        """As `ops.composite`."""
        self._expect_usable("composite", sigmas)
        check_samples("composite", sigmas, t_starts, t_ends, ray_offsets)
        features = sigmas.new_empty(len(sigmas), 0) if features is None else features
        expect_shape("composite", "rgbs", rgbs, (len(sigmas), 3))
        expect_shape("composite", "features", features, (len(sigmas), None))
        weights = self._weights(sigmas, t_starts, t_ends, ray_offsets, early_stop_eps)
        sum_up = functools.partial(
            self._nerfacc.accumulate_along_rays,
            weights,
            ray_indices=ray_indices(ray_offsets),
            n_rays=len(ray_offsets) - 1,
        )
        depth = sum_up(((t_starts + t_ends) / 2)[:, None])[:, 0]
        return CompositeOutput(sum_up(rgbs), depth, sum_up(None)[:, 0], sum_up(features), weights)

    def _weights(
        self,
        sigmas: torch.Tensor,
        t_starts: torch.Tensor,
        t_ends: torch.Tensor,
        ray_offsets: torch.Tensor,
        early_stop_eps: float,
    ) -> torch.Tensor:
        """(m,) weights; zero, without a gradient, from where the transmittance falls below `early_stop_eps`."""
        if len(sigmas) == 0:
            return sigmas * (t_ends - t_starts)
        weights, transmittance, _ = self._nerfacc.render_weight_from_density(
            t_starts, t_ends, sigmas, packed_info=packed_info_of(ray_offsets)
        )
        return weights.masked_fill(transmittance.detach() < early_stop_eps, 0.0)

    def _binaries(self, bitfield: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
        """Unpacked bits; unpacked again only when the bits have changed."""
        version = bitfield._version  # in-place writes count it up
        grid = self._grid
        if grid is None or grid.bitfield is not bitfield or grid.version != version:
            grid = self._grid = _Grid(bitfield, version, binaries_of(bitfield, spec))
        return grid.binaries

    def _expect_usable(self, where: str, tensor: torch.Tensor) -> None:
        expect_dtype(where, "inputs", tensor, (torch.float32,))
        if tensor.device.type != self._device_type:
            raise BackendError(
                f"{where}: nerfacc computes on {self._device_type} only; got tensors on {tensor.device}: "
                "set render.backend=native"
            )


class _Rays(NamedTuple):
    """Rays that nerfacc can be given: finite, with an empty span where there is nothing to march."""

    origins: torch.Tensor  # (n, 3)
    directions: torch.Tensor  # (n, 3)
    starts: torch.Tensor  # (n,) beginning of the lattice
    ends: torch.Tensor  # (n,) exit


def _clean_rays(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    jitter: torch.Tensor | None,
    spec: MarchSpec,
) -> _Rays:
    """Rays cut to the box, their lattice shifted by the jitter. nerfacc never returns from a ray that holds a NaN."""
    entry, exit_, meets = clip_rays(rays_o, rays_d, near, far, aabb)
    start = entry if jitter is None else entry + jitter * step_at(entry, spec)
    meets = meets & (start < exit_)
    along_z = rays_d.new_tensor([0.0, 0.0, 1.0])
    return _Rays(
        torch.where(meets[:, None], rays_o, 0.5),
        torch.where(meets[:, None], rays_d, along_z),
        torch.where(meets, start, 0.0),
        torch.where(meets, exit_, 0.0),
    )


_KERNELS = NerfaccKernels(NERFACC.load)
RENDER_BACKENDS.register("nerfacc")(MarchingBackend(_KERNELS.march, _KERNELS.compact, _KERNELS.composite))
