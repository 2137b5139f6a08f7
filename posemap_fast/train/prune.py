"""After stage 1: keep only the occupied cells that training rays see matter in.

The moving maximum of the density also holds what lies behind walls and thin fog that no ray notices. One pass over
a sample of the training pixels tells which cells contribute; with their neighbours they are all that later stages
march through, which makes rendering several times faster.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from posemap_fast.fields import NeRFP
from posemap_fast.geometry import camera_rays
from posemap_fast.ops.march import cells_of
from posemap_fast.render import Renderer
from posemap_fast.seeding import step_generator, uniform
from posemap_fast.train.nerfp import TrainingViews

__all__ = ["prune_occupancy"]

_RAYS_PER_VIEW = 2048
_MIN_WEIGHT = 1e-2  # compositing weight below which a sample is not missed


@torch.no_grad()
def prune_occupancy(nerfp: NeRFP, renderer: Renderer, views: TrainingViews, seed: int) -> float:
    """Restrict the occupancy grid to cells seen by training rays and their neighbours; returns the share kept."""
    spec, camera = renderer.march_spec, views.camera
    occupancy = renderer.occupancy
    before = occupancy.occupied_fraction()
    peak = torch.zeros_like(occupancy.occs)
    size = torch.tensor([camera.width, camera.height], device=peak.device)
    for i in range(len(views)):
        generator = step_generator(seed, "prune", i)
        pixels = uniform(generator, _RAYS_PER_VIEW, 2, device=peak.device) * size
        rays_o, rays_d = camera_rays(camera, views.c2w[i], pixels)
        out = renderer.render_rays(nerfp, rays_o, rays_d, want_rgb=False)
        origins, directions = renderer.to_field(rays_o, rays_d)
        samples = out.samples
        middle = (0.5 * (samples.t_starts + samples.t_ends))[:, None]
        cells = cells_of(origins[samples.ray_indices] + directions[samples.ray_indices] * middle, spec)
        inside = cells >= 0
        peak.scatter_reduce_(0, cells[inside], out.weights[inside], "amax")
    grid = (peak > _MIN_WEIGHT).float().reshape(spec.n_cascades, 1, *[spec.resolution] * 3)
    near_matter = F.max_pool3d(grid, kernel_size=3, stride=1, padding=1).flatten() > 0
    occupancy.keep_only(near_matter)
    return occupancy.occupied_fraction() / max(before, 1e-9)
