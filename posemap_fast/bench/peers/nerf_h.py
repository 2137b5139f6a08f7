"""NeRF-H, the histogram-assisted NeRF that DFNet renders its training views with, in plain torch.

Written from the papers: DFNet (Chen et al. 2022, arXiv:2204.00559, section 3.2), which builds on NeRF in the Wild
(Martin-Brualla et al. 2021, arXiv:2008.02268, section 4). Two multilayer perceptrons of depth 8 and width 128 with a
skip connection at layer 4; positions are encoded with 10 frequencies (63 numbers), directions with 4 (27):

    coarse   63 -> 8 x 128 -> sigma
    fine     63 -> 8 x 128 -> sigma_s, feature 128
             feature 128 + direction 27 + appearance 50 -> 64 -> rgb_s
             feature 128 + transient 20 -> 64 -> 64 -> 64 -> 64 -> sigma_t, rgb_t, beta

A ray takes 64 coarse samples and 64 more where those found matter; the fine network sees all 128, so a ray costs
64 + 128 evaluations. The coarse network has 131 969 parameters, the fine one 184 201. Colour of the coarse network
serves its training alone and is left out, to the advantage of NeRF-H.

The weights are random: the time of a rendering does not depend on them. Lengths are in the scene's unit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from posemap_fast.geometry import Camera, camera_rays

__all__ = [
    "APPEARANCE_DIM",
    "N_COARSE",
    "N_FINE",
    "TRANSIENT_DIM",
    "VIEW_SIZE",
    "CoarseNetwork",
    "Composited",
    "FineNetwork",
    "NeRFH",
    "Samples",
    "composite",
    "encode",
    "finer_depths",
]

VIEW_SIZE = (60, 106)  # height, width of the views that DFNet renders
N_COARSE, N_FINE = 64, 128  # evaluations of the two networks per ray
APPEARANCE_DIM, TRANSIENT_DIM = 50, 20
_DEPTH, _WIDTH, _SKIP, _HEAD = 8, 128, 4, 64
_POSITION_FREQUENCIES, _DIRECTION_FREQUENCIES = 10, 4
_BETA_MIN = 0.1
_LAST_DELTA = 1e2  # length of the last sample of a ray: to the far end of the world
_LEAST_WEIGHT = 1e-5  # so that no part of a ray is without finer samples
_RAYS_AT_ONCE = {"cpu": 128, "cuda": 2048}  # the fastest on the CPU; below 1 GiB of activations on both


class Samples(NamedTuple):
    """What the fine network says of s samples on each of n rays."""

    sigma_s: torch.Tensor  # (n, s) static density, 1/unit
    rgb_s: torch.Tensor  # (n, s, 3) in (0, 1)
    sigma_t: torch.Tensor  # (n, s) transient density, 1/unit
    rgb_t: torch.Tensor  # (n, s, 3) in (0, 1)
    beta: torch.Tensor  # (n, s) > 0


class Composited(NamedTuple):
    """What n rays see of both densities together."""

    rgb: torch.Tensor  # (n, 3)
    depth: torch.Tensor  # (n,) expected distance along the ray, not divided by the opacity
    opacity: torch.Tensor  # (n,)
    beta: torch.Tensor  # (n,) uncertainty of rgb, >= 0.1
    weights: torch.Tensor  # (n, s)


def encode(x: torch.Tensor, n_frequencies: int) -> torch.Tensor:
    """(..., 3) -> (..., 3 + 6 n): x itself, and sines and cosines of 2^k x."""
    scales = 2.0 ** torch.arange(n_frequencies, device=x.device)
    angles = (x[..., None, :] * scales[:, None]).flatten(-2)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


class _Trunk(nn.Module):
    """(..., 63) encoded positions -> (..., 128)."""

    def __init__(self) -> None:
        super().__init__()
        n_in = 3 + 6 * _POSITION_FREQUENCIES
        sizes = [n_in, *[_WIDTH] * (_DEPTH - 1)]
        sizes[_SKIP] += n_in
        self.layers = nn.ModuleList(nn.Linear(size, _WIDTH) for size in sizes)

    def forward(self, encoded: torch.Tensor) -> torch.Tensor:
        h = encoded
        for k, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([encoded, h], dim=-1) if k == _SKIP else h))
        return h


class CoarseNetwork(nn.Module):
    """Density alone."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _Trunk()
        self.density = nn.Linear(_WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, s, 3) positions -> (n, s) density, 1/unit."""
        return F.softplus(self.density(self.trunk(encode(x, _POSITION_FREQUENCIES))))[..., 0]


class FineNetwork(nn.Module):
    """Static and transient radiance."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _Trunk()
        self.density = nn.Linear(_WIDTH, 1)
        self.feature = nn.Linear(_WIDTH, _WIDTH)
        n_view = 3 + 6 * _DIRECTION_FREQUENCIES + APPEARANCE_DIM
        self.colour = nn.Sequential(nn.Linear(_WIDTH + n_view, _HEAD), nn.ReLU(), nn.Linear(_HEAD, 3))
        sizes = [_WIDTH + TRANSIENT_DIM, *[_HEAD] * 3]
        self.transient = nn.Sequential(*[part for n in sizes for part in (nn.Linear(n, _HEAD), nn.ReLU())])
        self.transient_density = nn.Linear(_HEAD, 1)
        self.transient_colour = nn.Linear(_HEAD, 3)
        self.transient_beta = nn.Linear(_HEAD, 1)

    def forward(
        self, x: torch.Tensor, rays_d: torch.Tensor, appearance: torch.Tensor, transient: torch.Tensor
    ) -> Samples:
        """Positions (n, s, 3), unit directions (n, 3), and the codes (50,) and (20,) of the image -> samples."""
        n_samples = x.shape[1]
        h = self.trunk(encode(x, _POSITION_FREQUENCIES))
        feature = self.feature(h)
        view = torch.cat([encode(rays_d, _DIRECTION_FREQUENCIES), appearance.expand(len(x), -1)], dim=1)
        rgb_s = self.colour(torch.cat([feature, view[:, None].expand(-1, n_samples, -1)], dim=-1))
        t = self.transient(torch.cat([feature, transient.expand(*x.shape[:2], -1)], dim=-1))
        return Samples(
            F.softplus(self.density(h))[..., 0],
            rgb_s.sigmoid(),
            F.softplus(self.transient_density(t))[..., 0],
            self.transient_colour(t).sigmoid(),
            F.softplus(self.transient_beta(t))[..., 0],
        )


def _light(depths: torch.Tensor, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths of the samples and the transmittance before each, both (n, s)."""
    deltas = torch.cat([depths.diff(dim=1), torch.full_like(depths[:, :1], _LAST_DELTA)], dim=1)
    before = torch.cat([torch.zeros_like(deltas[:, :1]), (sigmas * deltas)[:, :-1].cumsum(dim=1)], dim=1)
    return deltas, torch.exp(-before)


def composite(depths: torch.Tensor, samples: Samples) -> Composited:
    """Volume rendering of both densities (NeRF in the Wild, Eq. 5).

    Args:
        depths: (n, s) increasing distances along the rays.
    """
    deltas, transmittance = _light(depths, samples.sigma_s + samples.sigma_t)
    alpha_s, alpha_t = -torch.expm1(-samples.sigma_s * deltas), -torch.expm1(-samples.sigma_t * deltas)
    weights = -torch.expm1(-(samples.sigma_s + samples.sigma_t) * deltas) * transmittance
    shown = alpha_s[..., None] * samples.rgb_s + alpha_t[..., None] * samples.rgb_t
    return Composited(
        (transmittance[..., None] * shown).sum(dim=1),
        (weights * depths).sum(dim=1),
        weights.sum(dim=1),
        (transmittance * alpha_t * samples.beta).sum(dim=1) + _BETA_MIN,
        weights,
    )


def finer_depths(depths: torch.Tensor, weights: torch.Tensor, n_more: int) -> torch.Tensor:
    """Depths, and more of them where the weights are, by the inverse of their distribution (Mildenhall et al. 2020).

    Args:
        depths, weights: (n, s), of the coarse samples; the first and the last weight are not used.
    Returns:
        (n, s + n_more) in increasing order.
    """
    edges = 0.5 * (depths[:, 1:] + depths[:, :-1])  # (n, s - 1)
    mass = weights[:, 1:-1] + _LEAST_WEIGHT
    cdf = F.pad((mass / mass.sum(dim=1, keepdim=True)).cumsum(dim=1), (1, 0))  # (n, s - 1)
    u = torch.linspace(0, 1, n_more, device=depths.device).expand(len(depths), -1).contiguous()
    above = torch.searchsorted(cdf, u, right=True).clamp(1, cdf.shape[1] - 1)
    low, high = cdf.gather(1, above - 1), cdf.gather(1, above)
    share = ((u - low) / (high - low).clamp(min=_LEAST_WEIGHT)).clamp(0, 1)
    more = torch.lerp(edges.gather(1, above - 1), edges.gather(1, above), share)
    return torch.cat([depths, more], dim=1).sort(dim=1).values


class NeRFH(nn.Module):
    """Both networks with random weights.

    Args:
        near, far: where rays begin and end, units of the scene.
        seed: of the weights and of the image's codes.
    """

    appearance: torch.Tensor
    transient: torch.Tensor

    def __init__(self, near: float = 0.05, far: float = 5.0, seed: int = 0):
        super().__init__()
        self.near, self.far = near, far
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.coarse, self.fine = CoarseNetwork(), FineNetwork()
            self.register_buffer("appearance", torch.randn(APPEARANCE_DIM))
            self.register_buffer("transient", torch.randn(TRANSIENT_DIM))

    @torch.no_grad()
    def render_rays(self, rays_o: torch.Tensor, rays_d: torch.Tensor) -> Composited:
        """What rays see: origins and unit directions (n, 3)."""
        depths = torch.linspace(self.near, self.far, N_COARSE, device=rays_o.device).expand(len(rays_o), -1)
        sigmas = self.coarse(_points(rays_o, rays_d, depths))
        deltas, transmittance = _light(depths, sigmas)
        weights = -torch.expm1(-sigmas * deltas) * transmittance
        depths = finer_depths(depths, weights, N_FINE - N_COARSE)
        return composite(depths, self.fine(_points(rays_o, rays_d, depths), rays_d, self.appearance, self.transient))

    @torch.no_grad()
    def render_view(self, camera: Camera, c2w: torch.Tensor) -> torch.Tensor:
        """(4, 4) camera-to-world -> the view (height, width, 3) in [0, 1]."""
        rays = camera_rays(camera, c2w, camera.pixel_grid().to(c2w))
        chunks = [part.split(_RAYS_AT_ONCE[c2w.device.type]) for part in rays]
        rgb = torch.cat([self.render_rays(o, d).rgb for o, d in zip(*chunks, strict=True)])
        return rgb.clamp(0, 1).view(camera.height, camera.width, 3)


def _points(rays_o: torch.Tensor, rays_d: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
    """(n, 3), (n, 3), (n, s) -> (n, s, 3)."""
    return rays_o[:, None] + rays_d[:, None] * depths[..., None]
