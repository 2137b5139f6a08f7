"""iNeRF (Yen-Chen et al. 2021, arXiv:2012.05877): an image's pose by descent through a renderer.

Adam turns and moves a camera so that what the field shows along the rays of some pixels, drawn anew each step, becomes
their colours. Of the paper are the loss (mean square of colours), the number of pixels (2048), the rate and its decay
(0.01 radians, and scene units, 0.8 per hundred steps) and Adam's betas (0.9, 0.999). Otherwise than there, turns are
about the camera's centre, not along screws; pixels are drawn with replacement from the whole image, not from regions
of interest; and there are fifty steps, as in NeFeS (Chen et al. 2024, arXiv:2303.10087), which descends on features,
instead of three hundred. The renderer is ours, whose gradient reaches the rays through hash grid and compositing.
"""

from __future__ import annotations

import torch

from posemap_fast.geometry import Camera, camera_rays, move_poses
from posemap_fast.render import Renderer
from posemap_fast.render.renderer import PoseField
from posemap_fast.seeding import integers, step_generator

__all__ = ["N_STEPS", "descend"]

N_STEPS = 50
_PIXELS = 2048
_RATE, _DECAY, _DECAY_STEPS = 0.01, 0.8, 100


def descend(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    images: torch.Tensor,
    codes: torch.Tensor | None,
    start: torch.Tensor,
    *,
    n_steps: int = N_STEPS,
) -> torch.Tensor:
    """Poses (n, 4, 4), camera-to-world, world frame, at which the field looks more like the images.

    Args:
        images: (n, 3, H, W) float in [0, 1], of `camera`'s size.
        codes: (n, dim) appearance codes of the images, or None.
        start: (n, 4, 4) float32.
    """
    n = len(start)
    pixels, colours = camera.pixel_grid().to(start), images.flatten(2).transpose(1, 2)  # (H * W, 2), (n, H * W, 3)
    turn, move = (torch.zeros(n, 3, device=start.device, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam([turn, move], lr=_RATE)
    for k in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * _DECAY ** (k / _DECAY_STEPS)
        index = integers(step_generator(0, "inerf", k), len(pixels), _PIXELS, start.device)
        rays_o, rays_d = camera_rays(camera, move_poses(start, turn, move), pixels[index])
        out = renderer.render_rays(
            nerfp,
            rays_o.reshape(-1, 3),
            rays_d.reshape(-1, 3),
            appearance=None if codes is None else codes.repeat_interleave(_PIXELS, dim=0),
        )
        loss = (out.rgb.view(n, _PIXELS, 3) - colours[:, index]).square().mean(dim=(1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return move_poses(start, turn, move).detach()
