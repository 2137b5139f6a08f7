"""Marching of rays through a cascaded occupancy grid, and packing of the grid's bits.

Cascade k of K covers the cube centred at 0.5 with side 2^(k-(K-1)) by resolution^3 cells, so k = K-1 is the whole unit
cube and k = 0 its inner box. Cell (k, z, y, x) is bit ((k * resolution + z) * resolution + y) * resolution + x, eight
to a byte, the first in the lowest bit. Native code: `cuda_ext/march`. Oracle and fallback: `ops.reference.march`.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.ops._faces import face_of
from posemap_fast.ops._register import define_op
from posemap_fast.ops.composite import FLOATS
from posemap_fast.ops.reference import march as reference

__all__ = ["MarchResult", "MarchSpec", "cells_of", "march", "occupied_at", "pack_bits"]


@dataclass(frozen=True)
class MarchSpec:
    """Geometry of the occupancy grid and of the steps through it."""

    resolution: int = 128  # cells per side of each cascade; a multiple of 4 (of 2 when there is one cascade)
    n_cascades: int = 1  # nested cubes, >= 1
    step_min: float = math.sqrt(3) / 1024  # field units, > 0 (steps below 2e-6 would not cross the cube)
    step_max: float = math.sqrt(3) / 1024  # field units, >= step_min
    cone_angle: float = 0.0  # dt = clamp(t * cone_angle, step_min, step_max); 0 is a constant step_min
    max_samples: int = 1024  # per ray, the nearest are kept

    def __post_init__(self) -> None:
        # Cascades nest along cell faces only if a quarter of the side is a whole number of cells.
        unit = 4 if self.n_cascades > 1 else 2
        if self.resolution < unit or self.resolution % unit or self.resolution > 1024:
            raise ConfigError(f"march: resolution must be a multiple of {unit} up to 1024; got {self.resolution}")
        if not 1 <= self.n_cascades <= 16:
            raise ConfigError(f"march: n_cascades must be 1 to 16; got {self.n_cascades}")
        if not 0 < self.step_min <= self.step_max < math.inf:
            raise ConfigError(f"march: need 0 < step_min <= step_max; got {self.step_min} and {self.step_max}")
        if not 0 <= self.cone_angle < math.inf:
            raise ConfigError(f"march: cone_angle must be >= 0; got {self.cone_angle}")
        if self.max_samples < 1:
            raise ConfigError(f"march: max_samples must be >= 1; got {self.max_samples}")

    @property
    def n_cells(self) -> int:
        """Cells of all cascades; the bitfield has n_cells / 8 bytes."""
        return self.n_cascades * self.resolution**3


class MarchResult(NamedTuple):
    """Packed samples: those of ray r are ray_offsets[r] .. ray_offsets[r + 1] - 1, sorted by t."""

    ray_offsets: torch.Tensor  # (n + 1,) int64
    t_starts: torch.Tensor  # (m,)
    t_ends: torch.Tensor  # (m,)


def march(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    bitfield: torch.Tensor,
    spec: MarchSpec,
    jitter: torch.Tensor | None = None,
) -> MarchResult:
    """The intervals of each ray's lattice whose midpoint lies in an occupied cell.

        t_0 = entry + jitter * dt(entry),   t_{i+1} = t_i + dt(t_i),   dt(t) = clamp(cone_angle t, step_min, step_max)

    [entry, exit] is the part of [near, far] inside the aabb and the unit cube. The cell of a midpoint is that of the
    smallest cascade that contains it, or of a larger one while dt is longer than the cell. Samples never reach beyond
    `exit`: the last interval is cut there, and dropped if less than dt / 1000 of it is left. Empty cells are left in
    whole steps, so the samples of a sparse grid are exactly those of the full grid with an occupied midpoint.
    Args:
        rays_o, rays_d: (n, 3) float32/64, field frame; directions of unit length.
        near, far: (n,) same dtype, distances along the ray; far may be inf.
        aabb: (2, 3) same dtype, [min, max] in the field frame; what lies outside the unit cube is cut off.
        bitfield: (spec.n_cells / 8,) uint8, from `pack_bits`.
        jitter: (n,) in [0, 1) same dtype, or None for zeros.
    Returns:
        MarchResult. A ray that misses the box, or holds NaN or inf, has no samples.
    Raises:
        ShapeError: shapes, dtypes or devices do not agree; or the rays require grad while gradients are recorded.
    Not differentiable: positions get their gradient from `rays_o + t * rays_d` with t as a constant; call it under
    `torch.no_grad()` or on detached rays. Deterministic. Cost: count, scan and fill passes, one host sync for m.
    Reference: `ops.reference.march`.
    Example: a full grid, step 0.25, ray from (0, .5, .5) along x  ->  t_starts [0, .25, .5, .75]
    """
    _check_rays(rays_o, rays_d, near, far, aabb, jitter)
    expect_shape("march", "bitfield", bitfield, (spec.n_cells // 8,))
    expect_dtype("march", "bitfield", bitfield, (torch.uint8,))
    expect_same_device("march", rays_o=rays_o, rays_d=rays_d, near=near, far=far, aabb=aabb, bitfield=bitfield)
    return MarchResult(*_march_op(rays_o, rays_d, near, far, aabb, bitfield, jitter, *astuple(spec)))


def _check_rays(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    jitter: torch.Tensor | None,
) -> None:
    expect_shape("march", "rays_o", rays_o, (None, 3))
    expect_dtype("march", "rays_o", rays_o, FLOATS)
    n_rays = len(rays_o)
    shapes = {
        "rays_d": (rays_d, (n_rays, 3)),
        "near": (near, (n_rays,)),
        "far": (far, (n_rays,)),
        "aabb": (aabb, (2, 3)),
    }
    if jitter is not None:
        shapes["jitter"] = (jitter, (n_rays,))
        expect_same_device("march", rays_o=rays_o, jitter=jitter)
    for name, (tensor, shape) in shapes.items():
        expect_shape("march", name, tensor, shape)
        expect_dtype("march", name, tensor, (rays_o.dtype,))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rays_o, rays_d, near, far)):
        raise ShapeError("march: sample distances have no gradient; call it under torch.no_grad() or detach the rays")


def pack_bits(occs: torch.Tensor, threshold: float) -> torch.Tensor:
    """Occupancy bits: bit b of byte i is occs[8 i + b] > threshold (NaN is not).

    Args:
        occs: (n_cells,) float32/64 in the order of the module's header; n_cells a multiple of 8.
    Returns:
        (n_cells / 8,) uint8.
    Raises:
        ShapeError: wrong shape or dtype.
    Example: occs = [0, 1, 0, 0, 0, 0, 0, 1], threshold 0.5  ->  [0b10000010]
    """
    expect_shape("pack_bits", "occs", occs, (None,))
    expect_dtype("pack_bits", "occs", occs, FLOATS)
    if len(occs) % 8:
        raise ShapeError(f"pack_bits: the number of cells must be a multiple of 8; got {len(occs)}")
    return _pack_bits_op(occs.detach(), float(threshold))


def cells_of(positions: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
    """(n,) int64: cell of each position (n, 3) in the smallest cascade that contains it; -1 outside the unit cube."""
    expect_shape("cells_of", "positions", positions, (None, 3))
    is_inside = ((positions >= 0) & (positions <= 1)).all(1)
    cells = reference.cell_index(positions, torch.zeros_like(positions[:, 0]), spec)
    return torch.where(is_inside, cells, -1)


def occupied_at(positions: torch.Tensor, bitfield: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
    """(n,) bool: whether the cell of each position (n, 3) is occupied; False outside the unit cube."""
    expect_shape("occupied_at", "bitfield", bitfield, (spec.n_cells // 8,))
    cells = cells_of(positions, spec)
    return reference.is_occupied(bitfield, cells.clamp(min=0)) & (cells >= 0)


def _march(
    rays_o: torch.Tensor,
    rays_d: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    bitfield: torch.Tensor,
    jitter: torch.Tensor | None,
    resolution: int,
    n_cascades: int,
    step_min: float,
    step_max: float,
    cone_angle: float,
    max_samples: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    spec = MarchSpec(resolution, n_cascades, step_min, step_max, cone_angle, max_samples)
    face = face_of(rays_o)
    if face is None:
        return reference.march(rays_o, rays_d, near, far, aabb, bitfield, jitter, spec)
    rays = [None if t is None else t.contiguous() for t in (rays_o, rays_d, near, far, jitter)]
    fixed = (*rays, aabb.contiguous(), bitfield.contiguous(), len(rays_o), *astuple(spec))
    ray_offsets = rays_o.new_empty(len(rays_o) + 1, dtype=torch.int64)
    face.call("march_count", rays_o, *fixed, ray_offsets, *face.scratch("scan_scratch", rays_o, len(rays_o)))
    n_samples = int(ray_offsets[-1])  # on a GPU the one wait of a march: the size of its result
    t_starts, t_ends = rays_o.new_empty(n_samples), rays_o.new_empty(n_samples)
    face.call("march_fill", rays_o, *fixed, ray_offsets, t_starts, t_ends)
    return ray_offsets, t_starts, t_ends


def _march_fake(rays_o: torch.Tensor, *_others: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_samples = torch.library.get_ctx().new_dynamic_size()
    offsets = rays_o.new_empty(rays_o.shape[0] + 1, dtype=torch.int64)
    return offsets, rays_o.new_empty(n_samples), rays_o.new_empty(n_samples)


def _pack_bits(occs: torch.Tensor, threshold: float) -> torch.Tensor:
    face = face_of(occs)
    if face is None:
        return reference.pack_bits(occs, threshold)
    bits = occs.new_empty(len(occs) // 8, dtype=torch.uint8)
    face.call("pack_bits", occs, occs.contiguous(), bits, len(bits), threshold)
    return bits


def _pack_bits_fake(occs: torch.Tensor, threshold: float) -> torch.Tensor:
    return occs.new_empty(occs.shape[0] // 8, dtype=torch.uint8)


_march_op = define_op(
    "march(Tensor rays_o, Tensor rays_d, Tensor near, Tensor far, Tensor aabb, Tensor bitfield, Tensor? jitter, "
    "int resolution, int n_cascades, float step_min, float step_max, float cone_angle, int max_samples) "
    "-> (Tensor, Tensor, Tensor)",
    _march,
    _march_fake,
)
_pack_bits_op = define_op("pack_bits(Tensor occs, float threshold) -> Tensor", _pack_bits, _pack_bits_fake)
