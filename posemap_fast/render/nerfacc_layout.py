"""How this package's occupancy bits and packed samples look to nerfacc, and back. Torch only.

nerfacc's conventions, read from its sources (0.5.3: `grid.py`, `cuda/csrc/grid.cu`, `estimators/occ_grid.py`):

- `binaries` is (levels, res, res, res) bool indexed [level, x, y, z]; our bits run x fastest, then y, z and level.
- Level k is a box [xmin, ymin, zmin, xmax, ymax, zmax]; the first level that holds a point decides, so the finest
  comes first, as in ours: cascade k of K is the cube around 0.5 with side 2^(k-(K-1)).
- Rays own chunks of a flat tensor: `packed_info` (n_rays, 2) holds start and count; ours are the running sum.
- An interval is two edges of one list, marked `is_left` and `is_right`; neighbours share an edge.
"""

from __future__ import annotations

import math

import torch

from posemap_fast.ops import MarchSpec

__all__ = ["binaries_of", "finest_level", "level_aabbs", "offsets_of_counts", "packed_info_of"]


def binaries_of(bitfield: torch.Tensor, spec: MarchSpec) -> torch.Tensor:
    """(n_cells / 8,) uint8 -> (n_cascades, res, res, res) bool indexed [level, x, y, z]."""
    bits = (bitfield[:, None] >> torch.arange(8, dtype=torch.uint8, device=bitfield.device)) & 1
    res = spec.resolution
    return bits.bool().view(spec.n_cascades, res, res, res).permute(0, 3, 2, 1).contiguous()


def level_aabbs(spec: MarchSpec, device: torch.device) -> torch.Tensor:
    """(n_cascades, 6) float32: the box of each level, the finest first."""
    halves = 2.0 ** torch.arange(-spec.n_cascades, 0, device=device)  # half sides, 0.5 for the unit cube
    return torch.cat([(0.5 - halves)[:, None].expand(-1, 3), (0.5 + halves)[:, None].expand(-1, 3)], dim=1)


def finest_level(spec: MarchSpec) -> int:
    """The first level whose cells are not smaller than the shortest step; finer ones are left out.

    That is our rule for a constant step: the cell of a midpoint is not smaller than dt.
    """
    cells = [2.0 ** (level - (spec.n_cascades - 1)) / spec.resolution for level in range(spec.n_cascades)]
    fitting = [level for level, cell in enumerate(cells) if cell >= spec.step_min or math.isclose(cell, spec.step_min)]
    return fitting[0] if fitting else spec.n_cascades - 1


def offsets_of_counts(counts: torch.Tensor) -> torch.Tensor:
    """(n,) samples per ray -> (n + 1,) int64 from 0 to their number."""
    return torch.nn.functional.pad(counts.long().cumsum(0), (1, 0))


def packed_info_of(ray_offsets: torch.Tensor) -> torch.Tensor:
    """(n + 1,) offsets -> (n, 2) start and count of each ray."""
    return torch.stack([ray_offsets[:-1], ray_offsets.diff()], dim=1)
