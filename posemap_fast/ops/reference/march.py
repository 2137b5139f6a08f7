"""Marching through a cascaded occupancy bitfield in plain torch: the oracle, and what runs without native kernels.

It says what a march is without saying how to be fast: all rays walk their lattice in lockstep, step by step, and keep
the intervals whose midpoint lies in an occupied cell. Nothing is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from posemap_fast.ops.march import MarchSpec

__all__ = ["MAX_LATTICE_STEPS", "cell_index", "clip_rays", "is_occupied", "march", "pack_bits", "step_at"]

MAX_LATTICE_STEPS = 1 << 20  # a ray is given up after this many steps, so that no input can make it endless


def step_at(t: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
    """Length of the step that starts at t."""
    return (t * spec.cone_angle).clamp(max=spec.step_max).clamp(min=spec.step_min)


def clip_rays(
    rays_o: torch.Tensor, rays_d: torch.Tensor, near: torch.Tensor, far: torch.Tensor, aabb: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entry, exit (n,) and whether the ray meets the box (and the unit cube) between near and far, with finite numbers.

    A component that does not move decides by its origin alone.
    """
    low, high = aabb[0].clamp(min=0.0), aabb[1].clamp(max=1.0)
    still = rays_d == 0
    safe_d = torch.where(still, 1.0, rays_d)
    first, last = (low - rays_o) / safe_d, (high - rays_o) / safe_d
    first, last = torch.where(rays_d > 0, first, last), torch.where(rays_d > 0, last, first)
    entry = torch.maximum(near, first.masked_fill(still, -torch.inf).amax(1))
    exit_ = torch.minimum(far, last.masked_fill(still, torch.inf).amin(1))
    inside = ((rays_o >= low) & (rays_o <= high)) | ~still
    is_finite = rays_o.isfinite().all(1) & rays_d.isfinite().all(1) & entry.isfinite()
    return entry, exit_, inside.all(1) & is_finite & (entry < exit_)


def cell_index(positions: torch.Tensor, dts: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
    """(n,) int64 bit of each position: its cell in the finest cascade that holds it, with cells not smaller than dt.

    Positions beyond the unit cube fall into its outermost cells.
    """
    scale = positions.new_full((len(positions),), float(2 ** (spec.n_cascades - 1)))
    level = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
    reach = (positions - 0.5).abs().amax(1)
    for _ in range(spec.n_cascades - 1):
        is_raised = (reach * scale > 0.5) | (dts * scale * spec.resolution > 1)
        scale = torch.where(is_raised, scale * 0.5, scale)
        level = level + is_raised
    cells = ((positions - 0.5) * scale[:, None] + 0.5) * spec.resolution
    x, y, z = cells.nan_to_num(0.0).clamp(0, spec.resolution - 1).long().unbind(1)
    return ((level * spec.resolution + z) * spec.resolution + y) * spec.resolution + x


def is_occupied(bitfield: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(n,) bool: the bits at `index`."""
    return (bitfield[index >> 3] >> (index & 7)) & 1 > 0


def pack_bits(occs: torch.Tensor, threshold: float) -> torch.Tensor:
    """(n_cells / 8,) uint8: bit b of byte i is occs[8 i + b] > threshold."""
    powers = 2 ** torch.arange(8, device=occs.device)
    return ((occs > threshold).view(-1, 8) * powers).sum(1).to(torch.uint8)


def march(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    bitfield: torch.Tensor,
    jitter: torch.Tensor | None,
    spec: MarchSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ray_offsets (n + 1,), t_starts (m,), t_ends (m,); see `posemap_fast.ops.march`."""
    entry, exit_, meets = clip_rays(rays_o, rays_d, near, far, aabb)
    jitter = torch.zeros_like(near) if jitter is None else jitter
    first = entry + jitter * step_at(entry, spec)
    ray = (meets & jitter.isfinite()).nonzero()[:, 0]  # the rays that are still under way
    first, t = first[ray], first[ray]
    counts = torch.zeros(len(rays_o), dtype=torch.int64, device=rays_o.device)
    found = [(ray[:0], t[:0], t[:0])]
    for i in range(MAX_LATTICE_STEPS):
        dt = step_at(t, spec)
        alive = (exit_[ray] - t > 1e-3 * dt) & (counts[ray] < spec.max_samples)
        ray, first, t, dt = ray[alive], first[alive], t[alive], dt[alive]
        if len(ray) == 0:
            break
        following = first + (i + 1) * dt if spec.cone_angle == 0 else t + dt
        end = torch.minimum(following, exit_[ray])
        middle = rays_o[ray] + (t + end)[:, None] / 2 * rays_d[ray]
        hit = is_occupied(bitfield, cell_index(middle, dt, spec))
        found.append((ray[hit], t[hit], end[hit]))
        counts[ray[hit]] += 1
        t = following
    rays, starts, ends = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = rays.argsort(stable=True)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)), starts[order], ends[order]
