"""`posemap train`: every stage of one scene, resumable."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.experiment import load_experiment, preset_names
from posemap_fast.pipeline import run_pipeline
from posemap_fast.progress import make_progress
from posemap_fast.results import print_table
from posemap_fast.run_dir import RunDirectory, RunIdentity
from posemap_fast.suite import SUITES, print_suite, run_suite, scene_folders

__all__ = ["train"]

_DESCRIPTION = """\
Learn one scene from posed images: field, PoseMap, pose regression network, alignment; then measure it on the
held-out views, its answers as they are and corrected by the map, and write a report. Interrupt it whenever you like:
the same command goes on where it stopped.

The scene is `room` (procedural, needs no data) or a folder: transforms.json (nerfstudio or instant-ngp style,
optionally split.json with the lists train, val and test), a COLMAP model, a scene of 7-Scenes or Cambridge Landmarks,
a TUM RGB-D sequence. Scale, bounds and near distance are found automatically. With --dataset and --root every scene
of a benchmark is run, one after the other, and one table shows them beside published figures.

Presets: smoke (a minute, for a first look), cpu (about ten minutes on two cores), gpu, paper.
"""
_EXAMPLE = """\
examples:
  posemap train                                      the embedded scene, CPU preset, into runs/room
  posemap train --scene my_capture --out runs/mine
  posemap train --dataset 7scenes --root /data/7scenes --gt sfm --scenes chess,fire
  posemap train --scene my_capture --set apr.steps=2000 --set field.appearance_dim=0 --seed 1 --out runs/mine_1
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scene", help="`room`, or the path of a capture (default: room)")
    parser.add_argument("--dataset", help=f"format of --scene; with --root a benchmark: {', '.join(SUITES)}")
    parser.add_argument("--root", type=Path, help="folder that holds the scenes of --dataset")
    parser.add_argument("--scenes", metavar="A,B", help="only these scenes of --root (default: all that are there)")
    parser.add_argument("--gt", choices=["sfm", "dslam"], help="ground truth of 7-Scenes (default: sfm where present)")
    parser.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    parser.add_argument("--config", type=Path, action="append", default=[], help="further YAML file over the preset")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key of the config")
    parser.add_argument("--out", type=Path, help="directory of the run (default: runs/<scene>, or runs/<dataset>_<gt>)")
    parser.add_argument("--seed", type=int, default=0, help="all randomness follows from it (default: 0)")
    parser.add_argument(
        "--no-refine",
        action="store_true",
        help="do not judge answers that the map corrects (a part of a second per view; `posemap refine` does it later, "
        "for refined.json alone)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the final table")


def _scene_name(scene: str) -> tuple[str, str]:
    """(identity, short name) of the scene argument."""
    if scene == "room":
        return scene, scene
    path = Path(scene).expanduser().resolve()
    if not path.exists():
        raise DatasetError(f"--scene {scene}: no such file or folder; give `room` or the path of a capture")
    return str(path), (path.parent.name if path.is_file() else path.name)


def train(options: argparse.Namespace) -> int:
    """One scene, or all of a benchmark."""
    if options.root is not None:
        return _train_suite(options)
    if options.scenes is not None:
        raise ConfigError("--scenes: needs --root, the folder that holds them")
    identity, name = _scene_name(options.scene or "room")
    _train_scene(options, identity, _runs(options, name), _overrides(options))
    return 0


def _train_suite(options: argparse.Namespace) -> int:
    """Every scene of a benchmark, and its table."""
    if options.scene is not None or options.dataset is None:
        raise ConfigError("--root: needs --dataset and no --scene")
    suite = SUITES.get(options.dataset)
    wanted = [scene for scene in (options.scenes or "").split(",") if scene]
    folders = scene_folders(options.dataset, options.root.expanduser().resolve(), wanted)
    truth = options.gt or suite.ground_truths[0]
    if truth not in suite.ground_truths:
        raise ConfigError(f"--gt {truth}: {options.dataset} has {', '.join(suite.ground_truths)}")
    overrides = _overrides(options)
    if options.preset == "paper":
        overrides = [*suite.paper_overrides, *overrides]
    out = _runs(options, f"{options.dataset}_{truth}" if len(suite.ground_truths) > 1 else options.dataset)

    def train_scene(folder: Path, run: Path) -> dict[str, Any]:
        return _train_scene(options, str(folder), run, overrides)

    summaries = run_suite(options.dataset, folders, out, train_scene)
    print_suite(options.dataset, summaries, Console() if sys.stdout.isatty() else Console(width=200))
    return 0


def _overrides(options: argparse.Namespace) -> list[str]:
    """`--dataset` and `--gt` as overrides of the config, before those of `--set`."""
    given = {"data.dataset": options.dataset, "data.gt": options.gt}
    return [*(f"{key}={value}" for key, value in given.items() if value), *options.set]


def _runs(options: argparse.Namespace, name: str) -> Path:
    return (options.out or Path(os.environ.get("POSEMAP_RUNS", "runs")) / name).expanduser().resolve()


def _train_scene(options: argparse.Namespace, identity: str, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Run the pipeline of one scene and print its table."""
    config = load_experiment(options.preset, options.config, overrides).resolved()
    run = RunDirectory(out, RunIdentity(identity, options.preset, options.seed, config))
    console = Console() if sys.stdout.isatty() else Console(width=110)
    was_finished = run.is_finished()
    summary = run_pipeline(run, make_progress(options.quiet), refine=not options.no_refine)
    print_table(summary, console)
    state = "already done" if was_finished else "done"
    console.print(f"{state}: {out}  (open report.html for pictures)", soft_wrap=True)
    if options.root is None:
        if not was_finished:
            console.print(f"ask: posemap localize {out} IMAGE, closer and slower with --refine", soft_wrap=True)
        if "refined" not in summary:
            console.print(f"what --refine is worth here: posemap refine {out}", soft_wrap=True)
    return summary


COMMANDS.register("train")(
    Command("train one scene, all stages, resumable", _DESCRIPTION, _EXAMPLE, _add_arguments, train)
)
