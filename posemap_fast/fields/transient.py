"""Transient branch of NeRF-W and NeRF-H (arXiv:2008.02268, section 4.2; DFNet, arXiv:2204.00559, section 3.2).

What is in one image only (people, cars) is explained by a second density with its own colour and an uncertainty beta,
so that the static field need not. All three depend on a code of the image, which comes from its luminance histogram
as the appearance code does. They are trained along in stage 1 and left out of every later rendering.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.fields.protocol import FieldConfig

__all__ = ["TransientHead"]


class TransientHead(nn.Module):
    """Density, colour and uncertainty of each sample that belong to its image alone.

        sigma_t = softplus(a),  rgb_t = sigmoid(b),  beta = softplus(c),   [a, b, c] = MLP([geo, code])

    The MLP has two hidden layers. `beta_min` is added to the composited beta of a ray (`Renderer.render_transient`).
    """

    beta_min = 0.1  # NeRF-W: how far a loss trusts the most certain colour

    def __init__(self, config: FieldConfig):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(1 + config.geo_features + config.transient_dim, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, 5),
        )

    def forward(
        self, geo: torch.Tensor, codes: torch.Tensor, ray_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values of n samples.

        Args:
            geo: (n, 1 + geo_features) of `FieldFeatures`; a gradient goes back through it.
            codes: (n_rays, transient_dim).
            ray_indices: (n,) int64, the ray of each sample.
        Returns:
            sigma_t (n,) in 1/unit of the cube, rgb_t (n, 3) in (0, 1), beta (n,); all > 0.
        """
        raw = self.layers(torch.cat([geo, codes[ray_indices]], dim=1))
        return functional.softplus(raw[:, 0]), torch.sigmoid(raw[:, 1:4]), functional.softplus(raw[:, 4])
