"""Cascaded occupancy grid: which cells of the unit cube may hold matter (Müller et al. 2022, appendix C).

Cascade k of K covers the cube of side 2^(k-(K-1)) centred at 0.5; k = K-1 is the whole unit cube. Each cell
keeps a decaying maximum of the optical thickness of one marching step; a cell is occupied when that exceeds
a threshold. Cells that no training camera sees are never occupied, so nothing can float there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from posemap_fast.errors import ConfigError
from posemap_fast.ops import pack_bits
from posemap_fast.seeding import integers, uniform

__all__ = ["OccupancyConfig", "OccupancyGrid"]

_CHUNK = 1 << 17  # cells evaluated at once


@dataclass(frozen=True)
class OccupancyConfig:
    """Resolution and update rule of the occupancy grid."""

    resolution: int = 128  # cells per side and cascade, a multiple of 8
    decay: float = 0.95  # per update, of the moving maximum
    threshold: float = 0.01  # optical thickness of one step above which a cell is occupied
    update_every: int = 16  # training steps
    warmup_steps: int = 256  # all cells are evaluated at each update until then; a random half afterwards

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 8:
            raise ConfigError(f"resolution must be a positive multiple of 8; got {self.resolution}")
        if not 0 < self.decay < 1:
            raise ConfigError(f"decay must be between 0 and 1; got {self.decay}")


class OccupancyGrid(nn.Module):
    """State of the grid; `bitfield` is what `ops.march` reads.

    Buffers: occs (n_cells,) float32; visible (n_cells,) bool; bitfield (n_cells / 8,) uint8, cell index
    ((k res + z) res + y) res + x, lowest bit first.
    """

    occs: torch.Tensor
    visible: torch.Tensor
    bitfield: torch.Tensor

    def __init__(self, config: OccupancyConfig, n_cascades: int, step_min: float):
        super().__init__()
        self.config = config
        self.n_cascades = n_cascades
        self.step_min = step_min
        n_cells = n_cascades * config.resolution**3
        self.register_buffer("occs", torch.zeros(n_cells))
        self.register_buffer("visible", torch.ones(n_cells, dtype=torch.bool))
        self.register_buffer("bitfield", torch.full((n_cells // 8,), 255, dtype=torch.uint8))

    def cell_centers(self, cells: torch.Tensor) -> torch.Tensor:
        """(n,) cell indices -> (n, 3) centres in the unit cube."""
        return self._cell_points(cells, torch.full((cells.numel(), 3), 0.5, device=cells.device))

    def _cell_points(self, cells: torch.Tensor, fraction: torch.Tensor) -> torch.Tensor:
        """Points at `fraction` (n, 3) in [0, 1) of each cell."""
        res = self.config.resolution
        xyz = torch.stack([cells % res, cells // res % res, cells // res**2 % res], dim=1)
        side = self._cascade_side(cells // res**3)[:, None]
        return 0.5 + side * ((xyz + fraction) / res - 0.5)

    def _cascade_side(self, level: torch.Tensor) -> torch.Tensor:
        return torch.exp2((level - (self.n_cascades - 1)).float())

    def restrict(self, is_visible: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Mark cells whose centre fails `is_visible` ((n, 3) in the unit cube -> (n,) bool) as empty for good."""
        parts = [is_visible(self.cell_centers(cells)) for cells in self._all_cells().split(_CHUNK)]
        self.visible &= torch.cat(parts)
        self.bitfield.copy_(pack_bits(self.visible.float(), 0.5))

    def keep_only(self, cells: torch.Tensor) -> None:
        """Empty every occupied cell that is not in `cells` (n_cells,) bool; the rest stays as it is."""
        occupied = self.is_occupied_cell(self._all_cells())
        self.bitfield.copy_(pack_bits((occupied & cells).float(), 0.5))

    @torch.no_grad()
    def update(self, step: int, density: Callable[[torch.Tensor], torch.Tensor], generator: torch.Generator) -> None:
        """Decay, evaluate the density at one random point of (a part of) the cells, and pack the bits anew.

        Args:
            step: training step; decides between all cells and a random half.
            density: (n, 3) in the unit cube -> (n,) density in 1/unit.
            generator: source of the cells and of the points in them.
        """
        cells = self._cells_to_update(step, generator)
        self.occs.mul_(self.config.decay)
        level_step = self._level_steps()
        for part in cells.split(_CHUNK):
            points = self._cell_points(part, uniform(generator, part.numel(), 3, device=part.device))
            thickness = density(points) * level_step[part // self.config.resolution**3]
            self.occs[part] = torch.maximum(self.occs[part], thickness)
        threshold = min(float(self.occs[self.visible].mean()), self.config.threshold)
        self.bitfield.copy_(pack_bits(self.occs * self.visible, threshold))

    def _level_steps(self) -> torch.Tensor:
        """Typical marching step in each cascade: the finest one in the inner box, twice as much in each outer."""
        return self.step_min * torch.exp2(torch.arange(self.n_cascades, device=self.occs.device).float())

    def _all_cells(self) -> torch.Tensor:
        return torch.arange(self.occs.numel(), device=self.occs.device)

    def _cells_to_update(self, step: int, generator: torch.Generator) -> torch.Tensor:
        candidates = torch.nonzero(self.visible).flatten()
        if step < self.config.warmup_steps:
            return candidates
        quarter = candidates.numel() // 4
        anywhere = candidates[integers(generator, candidates.numel(), quarter, candidates.device)]
        occupied = torch.nonzero(self.occs * self.visible > self.config.threshold).flatten()
        if occupied.numel() > quarter:
            occupied = occupied[integers(generator, occupied.numel(), quarter, occupied.device)]
        return torch.unique(torch.cat([anywhere, occupied]))

    def occupied_fraction(self) -> float:
        """Share of the visible cells that are occupied."""
        occupied = self.is_occupied_cell(self._all_cells())
        return float(occupied.sum()) / max(1, int(self.visible.sum()))

    def is_occupied_cell(self, cells: torch.Tensor) -> torch.Tensor:
        """(n,) cell indices -> (n,) bool."""
        return (self.bitfield[cells // 8] >> (cells % 8).to(torch.uint8)) & 1 == 1

    def is_occupied(self, x: torch.Tensor) -> torch.Tensor:
        """(n, 3) points in the unit cube -> (n,) bool in the finest cascade that holds them; False outside."""
        res = self.config.resolution
        distance = (x - 0.5).abs().amax(dim=1)
        level = torch.ceil(torch.log2((2 * distance).clamp(min=1e-12))) + (self.n_cascades - 1)
        level = level.clamp(0, self.n_cascades - 1).long()
        cell = ((x - 0.5) / self._cascade_side(level)[:, None] + 0.5) * res
        inside = (distance <= 0.5) & torch.isfinite(x).all(dim=1)
        cell = torch.where(inside[:, None], cell, torch.zeros_like(cell)).long().clamp(0, res - 1)
        index = ((level * res + cell[:, 2]) * res + cell[:, 1]) * res + cell[:, 0]
        return self.is_occupied_cell(torch.where(inside, index, 0)) & inside
