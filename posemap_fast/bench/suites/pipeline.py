"""A whole run on the scene `room`: the seconds of each part, and what was reached in them.

The preset `cpu` with shorter schedules and fewer and smaller views. A run is too long to be repeated: it is done once,
and the times are those that it reports itself. They count only where its goal is reached: a run that gets faster by
getting worse has no times.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison
from posemap_fast.bench.machine import yardstick
from posemap_fast.experiment import load_experiment
from posemap_fast.pipeline import run_pipeline
from posemap_fast.progress import NoProgress
from posemap_fast.run_dir import RunDirectory, RunIdentity

__all__ = ["Goal"]

_PRESET, _SEED = "cpu", 0
_SHORT = (
    *("data.room_train=60", "data.room_test=20", "data.room_width=120", "data.network_side=72"),
    *("nerf.steps=600", "posemap.steps=150", "apr.steps=120"),
    *("align.steps=20", "align.share=0.5"),
)
_SMOKE = (
    *("data.room_train=12", "data.room_test=4", "data.room_width=32", "data.network_side=0"),
    *("network.input_size=[24,32]", "field.log2_hashmap_size=10", "field.n_levels=4", "render.steps_per_unit=48"),
    *("render.occupancy.resolution=16", "nerf.steps=20", "nerf.samples_per_step=1024", "posemap.steps=3"),
    *("apr.steps=4", "apr.batch=2", "apr.rvs_batch=2", "apr.replay_batch=4"),
    *("align.steps=2", "align.image_pose.steps=2"),
)


@dataclass(frozen=True)
class Goal:
    """What a run has to reach on the test views.

    Attributes:
        psnr_db: mean PSNR of the map's renders, at least.
        share: median errors of the network over those of the nearest training view's pose, less than.
    """

    psnr_db: float
    share: float

    def error(self, summary: Mapping[str, Any]) -> float:
        """0 where the run with this summary (the content of summary.json) has reached it, else infinite."""
        network, nearest = summary["apr"], summary["baselines"]["nearest_view"]
        is_near = all(network[key] < self.share * nearest[key] for key in ("median_t_m", "median_r_deg"))
        return 0.0 if is_near and summary["nerf"]["psnr_db"] >= self.psnr_db else math.inf


_GOAL, _SMOKE_GOAL = Goal(29.0, 0.75), Goal(5.0, math.inf)


@FAMILIES.register("pipeline/room")
def pipeline_room(context: BenchContext) -> Iterator[Comparison]:
    """One case per part of the run that took time, `total` the last."""
    with yardstick(context.device, context.is_smoke) as peers:
        summary = _run(context)
    goal = _SMOKE_GOAL if context.is_smoke else _GOAL
    for part, seconds in summary["time_s"].items():
        if seconds > 0:
            yield Comparison(
                name=f"pipeline/room/{part}",
                run=_nothing,
                verify=functools.partial(goal.error, summary),
                tolerance=0.0,
                notes=_accuracy(summary) if part == "total" else {},
                measured_ms=1e3 * seconds,
                measured_peers_ms=peers,
            )


def _run(context: BenchContext) -> dict[str, Any]:
    """The summary of a run in a temporary folder."""
    overrides = [*_SHORT, *(_SMOKE if context.is_smoke else ()), f"device={context.device}"]
    config = load_experiment(_PRESET, overrides=overrides).resolved()
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run", RunIdentity("room", _PRESET, _SEED, config))
        return run_pipeline(run, NoProgress())


def _accuracy(summary: Mapping[str, Any]) -> dict[str, float | str]:
    """What was reached on the test views."""
    methods = {"network": summary["apr"], "nearest training view": summary["baselines"]["nearest_view"]}
    notes: dict[str, float | str] = {"PSNR (dB)": summary["nerf"]["psnr_db"]}
    for method, errors in methods.items():
        notes |= {f"{method}, median (m)": errors["median_t_m"], f"{method}, median (deg)": errors["median_r_deg"]}
    return notes


def _nothing() -> None:
    pass
