"""Renders and PoseMaps at the training poses: constant once the map is frozen, so computed once and kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from posemap_fast.fields import NeRFP
from posemap_fast.files import atomic_path
from posemap_fast.progress import ProgressMeter
from posemap_fast.render import Renderer, render_cells, render_views
from posemap_fast.train.nerfp import TrainingViews

__all__ = ["ViewCache", "to_uint8"]


def to_uint8(rgb: torch.Tensor) -> torch.Tensor:
    """Colours in [0, 1] -> uint8, rounded."""
    return (rgb * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass
class ViewCache:
    """What the map shows at the training poses."""

    renders: torch.Tensor  # (n, h, w, 3) uint8, at the size of random views
    posemaps: torch.Tensor  # (n, 256, rows, cols) float32
    points: torch.Tensor  # (n, rows, cols, 3) scene points that the cells show, world frame
    opacity: torch.Tensor  # (n, rows, cols)

    @classmethod
    @torch.no_grad()
    def load_or_render(
        cls,
        path: Path,
        renderer: Renderer,
        nerfp: NeRFP,
        views: TrainingViews,
        image_size: tuple[int, int],
        meter: ProgressMeter,
    ) -> ViewCache:
        """Read the cache of this run, or render it (seconds to a minute) and write it atomically."""
        if path.exists():
            return cls(**torch.load(path, map_location=views.c2w.device, weights_only=True))
        codes = nerfp.appearance_code(views.histograms)
        kept: list[torch.Tensor] = []  # filled in place: PoseMaps of a thousand views are a gigabyte
        with meter.task("view cache", total=len(views), start=0) as task:
            for i in range(len(views)):
                view = render_views(
                    renderer,
                    nerfp,
                    views.c2w[i : i + 1],
                    views.camera,
                    appearance=None if codes is None else codes[i : i + 1],
                    image_size=image_size,
                    with_posemap=False,
                )
                found = (to_uint8(view.rgb), *render_cells(renderer, nerfp, views.c2w[i : i + 1], views.camera))
                kept = kept or [part.new_empty(len(views), *part.shape[1:]) for part in found]
                for whole, part in zip(kept, found, strict=True):
                    whole[i : i + 1] = part
                task.update(i + 1)
        cache = cls(*kept)
        with atomic_path(path) as temporary:
            torch.save(vars(cache), temporary)
        return cache

    @property
    def feature_scale(self) -> float:
        """Root mean square norm of a PoseMap's cell."""
        return float(torch.linalg.vector_norm(self.posemaps, dim=1).square().mean().sqrt())
