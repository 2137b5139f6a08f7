"""Camera paths through the room: smooth, hand-held, clear of walls and furniture.

A person walks around the room and looks across it. The three paths differ in shape: the training path makes two laps
of varying radius and height, the test path is a shifted ellipse walked once the other way, the unlabelled path a
figure of three lobes. The seed moves the phases a little; the shapes, and so the difficulty, stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from posemap_fast.data.room.layout import clearance
from posemap_fast.geometry import look_at, so3_exp
from posemap_fast.seeding import step_generator

__all__ = ["MIN_CLEARANCE", "PATHS", "camera_path"]

MIN_CLEARANCE = 0.35  # m, from any camera to any surface
_PHASE = torch.tensor([4.54, 1.8, 5.65, 0.94])  # rad; of 300 drawn, test views are then farthest from training views
_FRAME_STEP = 1e-3  # m, of the numerical gradient of the clearance

Curve = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def _train(u: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two laps; u (n,) in [0, 1) and phases (4,) -> positions and targets (n, 3)."""
    turn = 2 * math.pi * u
    angle = 2 * turn + phase[0]
    radius = 1.15 + 0.45 * torch.sin(3 * turn + phase[1])
    height = 1.45 + 0.22 * torch.sin(5 * turn + phase[2])
    look = angle + math.pi + 0.8 * torch.sin(7 * turn + phase[3])
    return _polar(radius, angle, height), _polar(1.5, look, 1.1 + 0.45 * torch.sin(4 * turn + phase[1]))


def _test(u: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One lap of a shifted ellipse in the other direction."""
    turn = 2 * math.pi * u
    angle = phase[3] - turn
    position = _polar(1.0, angle, 1.42 + 0.12 * torch.sin(2 * turn + phase[2]))
    position = position * torch.tensor([1.25, 0.95, 1.0]) + torch.tensor([-0.15, 0.1, 0.0])
    look = angle + math.pi + 0.6 * torch.sin(5 * turn + phase[1])
    return position, _polar(1.5, look, 1.1 + 0.4 * torch.sin(3 * turn + phase[0]))


def _unlabelled(u: torch.Tensor, phase: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One lap with three lobes."""
    turn = 2 * math.pi * u
    angle = turn + phase[1]
    radius = 1.1 + 0.35 * torch.sin(3 * turn + phase[0])
    look = angle + math.pi + 0.4 * torch.sin(2 * turn + phase[2])
    return _polar(radius, angle, 1.45 + 0.15 * torch.sin(4 * turn)), _polar(1.5, look, torch.full_like(u, 1.1))


PATHS: dict[str, Curve] = {"train": _train, "test": _test, "unlabelled": _unlabelled}


def _polar(radius: torch.Tensor | float, angle: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle), height], dim=-1)


def _keep_clear(positions: np.ndarray) -> np.ndarray:
    """Push positions (n, 3) up the gradient of the clearance until all keep `MIN_CLEARANCE`, spreading each push."""
    positions = positions.copy()
    for _ in range(200):
        missing = np.maximum(MIN_CLEARANCE + 0.03 - clearance(positions), 0)
        if missing.max() <= 0.02:
            break
        steps = _FRAME_STEP * np.eye(3)
        slope = np.stack([clearance(positions + step) - clearance(positions - step) for step in steps], axis=1)
        away = slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-9) * missing[:, None]
        around = np.concatenate([away[-2:], away, away[:2]])
        spread = sum(around[i : i + len(away)] * weight for i, weight in enumerate((0.15, 0.3, 0.6, 0.3, 0.15)))
        positions += 0.5 * spread
    return positions


def camera_path(name: str, n_views: int, seed: int) -> torch.Tensor:
    """Poses (n_views, 4, 4) float64 along one of `PATHS`, with the small smooth sway of a hand."""
    phase = _PHASE + 0.2 * (torch.rand(4, generator=step_generator(seed, "room/path")) - 0.5)
    u = torch.arange(n_views) / n_views
    positions, targets = PATHS[name](u, phase)
    waves = torch.rand(6, generator=step_generator(seed, f"room/sway/{name}")) * 2 * math.pi
    tempo = torch.tensor([17.0, 23.0, 19.0, 29.0, 13.0, 11.0])
    sway = torch.sin(2 * math.pi * u[:, None] * tempo * n_views / 224 + waves)  # a few waves per metre
    positions = torch.from_numpy(_keep_clear((positions + 0.02 * sway[:, :3]).numpy()))
    assert clearance(positions.numpy()).min() > MIN_CLEARANCE, f"path {name} of seed {seed} touches something"
    c2w = look_at(positions.double(), targets.double(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    tilt = so3_exp(torch.deg2rad(sway[:, 3:].double() * torch.tensor([1.5, 1.5, 3.0])))  # about the camera's own axes
    c2w[:, :3, :3] = c2w[:, :3, :3] @ tilt
    return c2w
