"""Basin of attraction of PoseMaps: from how far away does following the PoseMap loss alone lead to the true pose?

A pose is displaced by a given distance in a random direction and by a given angle about a random axis; then Adam
walks down the distance between the PoseMap rendered there and the one at the true pose. No network and no image
takes part, so this judges the pose branch, as supervision (L_posemap) and as a means of refinement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from matplotlib.figure import Figure

from posemap_fast.errors import ConfigError
from posemap_fast.eval.metrics import pose_errors
from posemap_fast.eval.top_down import check_picture
from posemap_fast.files import atomic_path
from posemap_fast.geometry import Camera, make_c2w, move_poses, so3_exp
from posemap_fast.losses import posemap_cosine, posemap_l2
from posemap_fast.progress import ProgressMeter
from posemap_fast.render import PoseField, Renderer, render_posemaps
from posemap_fast.seeding import step_generator, uniform

__all__ = ["BASIN_STARTS", "BasinRow", "descend_posemap", "displaced", "draw_basin", "measure_basin"]

BASIN_STARTS = ((0.05, 2.0), (0.1, 5.0), (0.2, 10.0), (0.4, 20.0), (0.7, 30.0), (1.0, 30.0))  # world units, deg
_BETAS = (0.8, 0.95)  # of Adam: short memory, the landscape changes along the way


@dataclass(frozen=True)
class BasinRow:
    """Ends of the walks from one distance; errors as `pose_errors`, float64."""

    start_t: float  # world units
    start_r_deg: float
    end_t: torch.Tensor  # (n,)
    end_r_deg: torch.Tensor  # (n,)

    @property
    def came_home(self) -> torch.Tensor:
        """(n,) bool: nearer than half the start error in both."""
        return (self.end_t < self.start_t / 2) & (self.end_r_deg < self.start_r_deg / 2)

    @property
    def share(self) -> float:
        """Share of the walks that came home."""
        return float(self.came_home.double().mean())


def displaced(c2w: torch.Tensor, distance: float, angle_deg: float, generator: torch.Generator) -> torch.Tensor:
    """Poses (n, 4, 4) moved by exactly `distance` and turned by exactly `angle_deg`, in uniform random directions."""
    n = len(c2w)
    moved, turned = torch.randn(2, n, 3, generator=generator).to(c2w).unbind()
    rotation = so3_exp(turned / turned.norm(dim=1, keepdim=True) * math.radians(angle_deg))
    centre = c2w[:, :3, 3] + moved / moved.norm(dim=1, keepdim=True) * distance
    return make_c2w(rotation @ c2w[:, :3, :3], centre)


def descend_posemap(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    start: torch.Tensor,
    wanted: torch.Tensor,
    *,
    step_t: float,
    step_r_deg: float,
    n_steps: int = 80,
    loss: Literal["l2", "cosine"] = "l2",
) -> torch.Tensor:
    """Poses at which the rendered PoseMap comes close to the wanted one, by its gradient alone.

    Args:
        start: (n, 4, 4) float32 poses to begin at, world frame.
        wanted: (n, 256, rows, cols) PoseMaps.
        step_t, step_r_deg: length of Adam's first steps per axis; they shrink to 1 % along a cosine.
        loss: distance of PoseMaps; 'l2' has the wider basin where cells are far off.
    Returns:
        (n, 4, 4); views do not influence each other.
    """
    distance = posemap_l2 if loss == "l2" else posemap_cosine
    rates = (math.radians(step_r_deg), step_t)
    turn, move = (torch.zeros(len(start), 3, device=start.device, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate} for p, rate in zip((turn, move), rates, strict=True)], betas=_BETAS
    )
    for k in range(n_steps):
        factor = max(0.01, 0.5 * (1 + math.cos(math.pi * k / n_steps)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        poses = move_poses(start, turn, move)
        value = distance(render_posemaps(renderer, nerfp, poses, camera), wanted) * len(start)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return move_poses(start, turn, move).detach()


def measure_basin(
    renderer: Renderer,
    nerfp: PoseField,
    camera: Camera,
    c2w: torch.Tensor,
    starts: Sequence[tuple[float, float]],
    meter: ProgressMeter,
    *,
    n_steps: int = 80,
    loss: Literal["l2", "cosine"] = "l2",
    seed: int = 0,
) -> list[BasinRow]:
    """One row per (distance, angle) in `starts`, from every pose of `c2w` (n, 4, 4) float32.

    Raises:
        ConfigError: no pose, or a start that is not displaced at all.
    """
    if len(c2w) == 0:
        raise ConfigError("basin: needs at least one pose")
    if any(t <= 0 or r <= 0 for t, r in starts):
        raise ConfigError(f"basin: distances and angles must be > 0; got {list(starts)}")
    with torch.no_grad():
        wanted = render_posemaps(renderer, nerfp, c2w, camera)
    rows = []
    with meter.task("basin", total=len(starts)) as task:
        for k, (t, r) in enumerate(starts):
            begin = displaced(c2w, t, r, step_generator(seed, "basin", k))
            end = descend_posemap(
                renderer, nerfp, camera, begin, wanted, step_t=t / 10, step_r_deg=r / 10, n_steps=n_steps, loss=loss
            )
            rows.append(BasinRow(t, r, *pose_errors(end.cpu(), c2w.double().cpu())))
            task.update(k + 1, home=rows[-1].share)
    return rows


def draw_basin(path: str | Path, rows: Sequence[BasinRow], unit: str = "m") -> None:
    """Picture of start and end errors, one column per start; the suffix of `path` decides the format.

    Raises:
        ConfigError: a suffix that is no picture's.
    """
    path = check_picture(path)
    spread = torch.from_numpy(uniform(step_generator(0, "draw basin"), 10_000, device=torch.device("cpu")).numpy())
    with matplotlib.rc_context({"font.size": 9, "axes.grid": True, "grid.color": "#e6e8eb"}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        for axes, is_turn in zip(figure.subplots(1, 2), (False, True), strict=True):
            for column, row in enumerate(rows):
                end = (row.end_r_deg if is_turn else row.end_t).clamp(min=1e-4)
                home = row.came_home
                x = column + 0.5 * (spread[: len(end)] - 0.5)
                axes.plot(x[home], end[home], ".", color="#2563eb", alpha=0.6, markersize=4)
                axes.plot(x[~home], end[~home], "x", color="#dc2626", alpha=0.8, markersize=4)
                start = row.start_r_deg if is_turn else row.start_t
                axes.hlines(start, column - 0.4, column + 0.4, color="#111827", linewidth=1.5)
            axes.set_yscale("log")
            axes.set_ylabel("rotation error (deg)" if is_turn else f"translation error ({unit})")
            labels = [f"{row.start_t:g} {unit}\n{row.start_r_deg:g} deg\n{100 * row.share:.0f} %" for row in rows]
            axes.set_xticks(range(len(rows)), labels)
        figure.suptitle("Walks down the PoseMap loss: start (bar), end (blue: came home, red: did not)")
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lstrip("."), dpi=120)
