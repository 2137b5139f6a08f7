"""The PoseMap of an image, and the pose read off it: what a head's first guess is refined by.

    image -> backbone maps -> PoseMap F_hat and a confidence per cell -> scene points -> solve_pose(head's pose) -> pose

F_hat is compared with the PoseMap that the map renders at the true pose (`L_posemap`), so each of its cells learns what
the scene is there, whatever the pose: a dense target where L_pose has 12 numbers. `readout` turns a cell of a PoseMap
into the scene point that the cell's ray meets; it is fitted to the map before the network is trained.

L_posemap alone shapes F_hat: the solver takes the points as constants, and its pose teaches the confidences. The
gradient of the pose through the points is ten times that of L_posemap and drowns it: no loss on the pose reaches F_hat.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.apr.pose_solver import solve_pose
from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.seeding import integers, step_generator, stream_seed

__all__ = ["PoseMapReadout", "PoseMapRefiner", "RefinedPose"]

_READOUT_HIDDEN = 128
_FIT_STEPS, _FIT_CELLS, _FIT_RATE = 1000, 1024, 2e-3
_FIT_CLIP = 1.0  # of a point's error relative to the size of the scene: floaters must not bend the readout
_LEAST_OPACITY = 0.5  # a cell whose ray meets less has no point
_ITERATIONS = 5
_ROBUST_SCALE = 0.03  # radians
# Of the head's pose, where a cell weighs about 0.7. Learnt it comes out higher: the head is good where it was trained.
_PRIOR = 0.02
_LEAST_MISFIT = 1e-6  # radian^2: a twentieth of a degree


class RefinedPose(NamedTuple):
    """What the refiner makes of a batch of images."""

    vector12: torch.Tensor  # (B, 12) row-major [R | t] in the pose frame, R a rotation
    posemap: torch.Tensor  # (B, C, rows, cols) predicted
    log_sigma: torch.Tensor  # (B, 2) log standard deviations, see `_log_deviations`


class PoseMapReadout(nn.Module):
    """Scene points from PoseMaps, cell by cell.

    Args:
        channels: of the PoseMaps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, _READOUT_HIDDEN),
            nn.ReLU(),
            nn.Linear(_READOUT_HIDDEN, _READOUT_HIDDEN),
            nn.ReLU(),
            nn.Linear(_READOUT_HIDDEN, 3),
        )
        self.posemap_scale: torch.Tensor
        self.point_scale: torch.Tensor
        self.register_buffer("posemap_scale", torch.ones(1))  # typical norm of a PoseMap's cell
        self.register_buffer("point_scale", torch.ones(1))  # typical distance of a scene point, pose-frame units

    def forward(self, posemaps: torch.Tensor) -> torch.Tensor:
        """(B, C, rows, cols) -> (B, rows * cols, 3) in the pose frame."""
        return self._points(posemaps.flatten(2).transpose(1, 2))

    def _points(self, cells: torch.Tensor) -> torch.Tensor:
        return self.layers(cells / self.posemap_scale) * self.point_scale

    @classmethod
    def fit(cls, posemaps: torch.Tensor, points: torch.Tensor, opacity: torch.Tensor, seed: int) -> PoseMapReadout:
        """A readout fitted to PoseMaps of a map; a few seconds.

        Args:
            posemaps: (n, C, rows, cols).
            points: (n, rows, cols, 3) that the cells' rays meet, in the pose frame.
            opacity: (n, rows, cols); cells whose ray meets little have no point.
            seed: of the first weights and of the cells drawn.
        Raises:
            ConfigError: no cell has a point.
        """
        is_solid = opacity > _LEAST_OPACITY
        # Cells are picked step by step: the PoseMaps are too large to be copied.
        view, row, col = torch.nonzero(is_solid, as_tuple=True)
        if len(view) == 0:
            raise ConfigError("the map is empty: no ray of a training view meets anything; train stage 1 longer")
        wanted = points[is_solid]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(seed, "readout/initial weights"))
            readout = cls(posemaps.shape[1]).to(posemaps.device)
        norms = torch.linalg.vector_norm(posemaps, dim=1)[is_solid]
        readout.posemap_scale.fill_(float(norms.square().mean().sqrt().clamp(min=1e-6)))
        readout.point_scale.fill_(float(wanted.norm(dim=1).median().clamp(min=1e-6)))
        optimizer = torch.optim.Adam(readout.parameters(), lr=_FIT_RATE, fused=True)
        n = min(_FIT_CELLS, len(view))
        for k in range(_FIT_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _FIT_RATE * max(0.01, 0.5 * (1 + math.cos(math.pi * k / _FIT_STEPS)))
            chosen = integers(step_generator(seed, "readout", k), len(view), n, posemaps.device)
            cells = posemaps[view[chosen], :, row[chosen], col[chosen]]  # (n, C)
            error = (readout._points(cells) - wanted[chosen]).norm(dim=1) / readout.point_scale
            optimizer.zero_grad(set_to_none=True)
            error.clamp(max=_FIT_CLIP).mean().backward()
            optimizer.step()
        return readout.requires_grad_(False)


class PoseMapRefiner(nn.Module):
    """Predicts PoseMaps and solves for the pose.

    Args:
        local_channels, final_channels: of the backbone's maps.
        posemap_channels: C of the map's PoseMaps.
        cells: rows and columns of the PoseMaps.
        camera: of the images, at any size.
        channels: width inside.
    Attributes:
        readout: of scene points; to be replaced by one fitted to the map (`PoseMapReadout.fit`).
    """

    def __init__(
        self,
        local_channels: int,
        final_channels: int,
        posemap_channels: int,
        cells: tuple[int, int],
        camera: Camera,
        channels: int,
    ) -> None:
        super().__init__()
        if min(cells) < 1:
            raise ConfigError(f"network: posemap_cells must be (rows, columns), both >= 1; got {cells}")
        self.cells = cells
        self.local = nn.Conv2d(local_channels, channels, 1)
        self.final = nn.Conv2d(final_channels, channels, 1)
        self.mix = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 1),
            nn.ReLU(),
        )
        self.posemap = nn.Conv2d(2 * channels, posemap_channels, 1)
        self.confidence = nn.Conv2d(2 * channels, 1, 1)
        self.readout = PoseMapReadout(posemap_channels).requires_grad_(False)
        self.directions: torch.Tensor
        self.precision: torch.Tensor
        directions = camera_rays(camera, torch.eye(4), camera.cell_centers(*cells))[1]  # (rows * cols, 3)
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("precision", torch.full((6,), _PRIOR), persistent=False)

    def forward(
        self, local: torch.Tensor, final: torch.Tensor, vector12: torch.Tensor, rotation: torch.Tensor
    ) -> RefinedPose:
        """Refine poses; the start is a constant for the gradient, so that the head learns from its own loss.

        Args:
            local, final: the backbone's maps.
            vector12: (B, 12) of the head.
            rotation: (B, 3, 3), the nearest rotation of it.
        """
        coarse = functional.interpolate(self.final(final), size=local.shape[2:], mode="bilinear", align_corners=False)
        cells = self.mix(self.local(local) + coarse)
        if tuple(cells.shape[2:]) != self.cells:
            cells = functional.interpolate(cells, size=self.cells, mode="bilinear", align_corners=False)
        unit = self.posemap(cells).float()
        weights = functional.softplus(self.confidence(cells).float()).flatten(1)
        with torch.autocast(unit.device.type, enabled=False):
            posemap = unit * self.readout.posemap_scale
            solved = solve_pose(
                self.readout(posemap.detach()),
                weights,
                self.directions,
                rotation.detach(),
                vector12.detach()[:, 3::4],
                self.precision,
                iterations=_ITERATIONS,
                scale=_ROBUST_SCALE,
            )
            refined = torch.cat([solved.rotation, solved.position[..., None]], dim=-1).flatten(1)
            log_sigma = _log_deviations(solved.information.detach(), solved.misfit.detach())
        return RefinedPose(refined, posemap, log_sigma)


def _log_deviations(information: torch.Tensor, misfit: torch.Tensor) -> torch.Tensor:
    """(B, 2) log standard deviations of translation (pose-frame units) and rotation (radians), a posteriori.

    The inverse of the information (B, 6, 6) says what the cells' confidences and places promise; the misfit (B,), what
    is left of the offsets, whether they keep it: variances are its multiples (variance of unit weight, least squares).
    """
    covariance = torch.linalg.inv_ex(information).inverse
    variances = covariance.diagonal(dim1=1, dim2=2).clamp(min=1e-12)
    promised = torch.stack([variances[:, 3:].sum(-1), variances[:, :3].sum(-1)], dim=-1).log()
    return (promised + (misfit + _LEAST_MISFIT).log()[:, None]) / 2
