"""Multiresolution hash encoding in plain torch: the oracle of `ops.hash_encode` and its fallback.

Loops over levels and corners and reads like Mueller et al. 2022 (arXiv:2201.05989) with tiny-cuda-nn's conventions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from posemap_fast.ops.hash_encode import HashGridSpec

__all__ = ["clamped_positions", "corner_rows", "hash_encode", "hash_encode_gradients"]

PRIMES = (1, 2654435761, 805459861)
CORNERS = tuple(itertools.product((0, 1), repeat=3))


def corner_rows(corner: torch.Tensor, resolution: int, n_rows: int) -> torch.Tensor:
    """Row of a level's table for integer corners (n, 3): dense where `resolution**3` rows fit, hashed otherwise."""
    x, y, z = corner.unbind(-1)
    if resolution**3 <= n_rows:
        return (x + y * resolution + z * resolution**2) % n_rows
    return ((x * PRIMES[0]) ^ (y * PRIMES[1]) ^ (z * PRIMES[2])) % n_rows


def clamped_positions(x: torch.Tensor) -> torch.Tensor:
    """Positions in [0, 1], NaN as 0; the gradient passes from 0 to 1, the borders included.

    `clamp` would do, but its gradient exactly at a bound was 1 up to torch 2.13 and is 0 from 2.14 on.
    """
    return torch.where((x >= 0) & (x <= 1), x, (x > 1).to(x.dtype))


def _corners(
    unit: torch.Tensor, spec: HashGridSpec, level: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rows (n,) in the whole table, weights per axis (n, 3) and their signs (3,) for each of the eight corners."""
    first, end = spec.level_offsets[level : level + 2]
    position = unit * spec.scales[level] + 0.5
    cell = position.floor()
    fraction = position - cell
    for offset in CORNERS:
        is_far = torch.tensor(offset, dtype=torch.bool, device=unit.device)
        rows = first + corner_rows(cell.long() + is_far, spec.resolutions[level], end - first)
        yield rows, torch.where(is_far, fraction, 1.0 - fraction), is_far * 2.0 - 1.0


def hash_encode(x: torch.Tensor, table: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    """Trilinear interpolation of the table's rows at every level; arguments as `ops.hash_encode`.

    Returns:
        (n, n_levels * F), a view of an (n_levels * F, n) buffer. Differentiable in x and table by autograd.
    """
    unit = clamped_positions(x)
    levels = []
    for level in range(spec.n_levels):
        value = table.new_zeros(len(x), table.shape[1])
        for rows, weights, _ in _corners(unit, spec, level):
            value = value + weights.prod(-1, keepdim=True) * table.index_select(0, rows)
        levels.append(value.t())
    return torch.cat(levels).t()


def hash_encode_gradients(
    grad: torch.Tensor, x: torch.Tensor, table: torch.Tensor | None, spec: HashGridSpec
) -> torch.Tensor:
    """Gradient in x if a table is given, else in the table; what autograd finds, for use where it is not recording.

    Args:
        grad: (n, n_levels * F), cotangent of the encoding.
    """
    unit = clamped_positions(x)
    n_features = spec.n_features_per_level
    found = x.new_zeros(spec.n_entries, n_features) if table is None else torch.zeros_like(unit)
    for level in range(spec.n_levels):
        cotangent = grad[:, level * n_features : (level + 1) * n_features]
        for rows, weights, signs in _corners(unit, spec, level):
            if table is None:
                found.index_add_(0, rows, weights.prod(-1, keepdim=True) * cotangent)
                continue
            dot = (cotangent * table.index_select(0, rows)).sum(-1, keepdim=True)  # (n, 1)
            others = weights[:, [1, 2, 0]] * weights[:, [2, 0, 1]]  # product of the other two axes' weights
            found += spec.scales[level] * dot * others * signs.to(x.dtype)
    return found if table is None else torch.where((x >= 0) & (x <= 1), found, 0.0).contiguous()
