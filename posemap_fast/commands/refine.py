"""`posemap refine`: calibrate and score answers that the map corrects."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.localize import REFINEMENT, MapRefiner, PoseRegressor, SceneMap
from posemap_fast.progress import make_progress
from posemap_fast.refinement import PosedImages, RefinedScore, calibrate_refined, score_refined
from posemap_fast.results import finite
from posemap_fast.run_dir import RunDirectory
from posemap_fast.stages import read_scene
from posemap_fast.train import Checkpointer, predict_poses

__all__ = ["refine"]

_DESCRIPTION = """\
Judge the slow way to localize: the network's answer is moved until the map, rendered from there, looks like the image
(render and compare). Answers come several times closer, and how far parts of the picture pull the pose apart tells how
wrong it still is. Validation views calibrate that, test views score it; both are printed and kept in
RUN/refined.json, which gives `posemap localize RUN IMAGE --refine` its sigma. `posemap train` does this at its end;
here it is done again, with other settings if you like; interrupted, it goes on where it was. RUN must be finished,
its scene in place.
"""
_EXAMPLE = """\
examples:
  posemap refine runs/room
  posemap localize runs/room query.jpg --refine"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = REFINEMENT
    parser.add_argument("run", type=Path, help="run directory of a finished training")
    parser.add_argument(
        "--steps",
        type=int,
        default=defaults.steps,
        help="of the alignment, in each of its rounds (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=defaults.rows,
        help="height of the largest pictures, px; time goes with its square (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def refine(options: argparse.Namespace) -> int:
    """Calibrate, score, print and store."""
    run = RunDirectory.open(options.run)
    if not run.is_finished():
        raise ConfigError(f"{options.run}: this run is not finished; run 'posemap train' with it again first")
    config = dataclasses.replace(REFINEMENT, steps=options.steps, rows=options.rows)
    identity = run.identity
    device = torch.device(identity.config.device)
    if identity.config.threads:
        torch.set_num_threads(identity.config.threads)
    net = PoseRegressor.load(run.localizer_file, device).net
    refiner = MapRefiner(SceneMap.load(run.map_file, device=device), config)
    scene = read_scene(identity.scene, identity.config.data)
    if scene.fingerprint != run.fingerprint():
        raise ConfigError(
            f"{options.run}: the content of scene {identity.scene} has changed since this run, or another version of "
            "this program made it; give it back what it was trained with, or train again with another --out"
        )
    validation, test = (
        PosedImages.of(scene, split, scene.images.select(torch.tensor(scene.views(split), dtype=torch.long)).to(device))
        for split in ("val", "test")
    )
    if len(test.images) == 0:
        raise DatasetError(f"{identity.scene}: has no test views to score the refined answers on")
    meter = make_progress(options.quiet)
    folder = run.checkpoint(f"refine_{options.rows}x{options.steps}")

    def keep(name: str) -> Checkpointer:
        return Checkpointer(folder / f"{name}.pt", identity.config.checkpoint_every_s)

    errors = calibrate_refined(refiner, net, validation, identity.seed, meter, keep)
    score = score_refined(refiner, predict_poses(net, test.images), test, errors, meter, keep)
    errors.save(run.refined_file, finite({"n_val": len(validation.images), "test": score.to_dict()}))
    shutil.rmtree(folder, ignore_errors=True)
    _print(score, scene.is_metric, Console())
    print(f"stored: {run.refined_file}")
    return 0


def _print(score: RefinedScore, is_metric: bool, console: Console) -> None:
    unit = "m" if is_metric else "units"
    table = Table(title=f"{len(score.errors)} test views, {score.ms_per_image:.0f} ms per image, eight at a time")
    for column in ("", f"median t ({unit})", "median r (deg)", f"90 % below ({unit})", "90 % below (deg)"):
        table.add_column(column, justify="right" if column else "left")
    for name, errors in (("network", score.errors_before), ("refined", score.errors)):
        cells = [float(v) for q in (0.5, 0.9) for v in errors.quantile(q, dim=0)]
        table.add_row(name, f"{cells[0]:.3f}", f"{cells[1]:.2f}", f"{cells[2]:.3f}", f"{cells[3]:.2f}")
    console.print(table)
    for key, what in (("t", "translation"), ("r", "rotation")):
        console.print(f"{what}: {_trust(score.reliability[key].to_dict())}", highlight=False, soft_wrap=True)


def _trust(found: dict[str, Any]) -> str:
    inside = ", ".join(
        f"{100 * share:.0f} % of errors in the {float(level):.0%} interval"
        for level, share in found["coverage"].items()
    )
    share = found["p90_surest_half"] / max(found["p90_all"], 1e-12)
    return f"{inside}; 90th percentile of the surest half {share:.0%} of that of all"


COMMANDS.register("refine")(
    Command("answers that the map corrects: their errors", _DESCRIPTION, _EXAMPLE, _add_arguments, refine)
)
