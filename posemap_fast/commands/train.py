"""`posemap train`: every stage of one scene, resumable."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.errors import DatasetError
from posemap_fast.experiment import load_experiment, preset_names
from posemap_fast.pipeline import run_pipeline
from posemap_fast.progress import make_progress
from posemap_fast.results import print_table
from posemap_fast.run_dir import RunDirectory, RunIdentity

__all__ = ["train"]

_DESCRIPTION = """\
Learn one scene from posed images: field, PoseMap, pose regression network, alignment; then measure it on the
held-out views and write a report. Interrupt it whenever you like: the same command goes on where it stopped.

The scene is `room` (procedural, needs no data) or a folder with transforms.json (nerfstudio or instant-ngp style,
optionally split.json with the lists train, val and test). Scale, bounds and near distance are found automatically.

Presets: smoke (a minute, for a first look), cpu (about ten minutes on two cores), gpu, paper.
"""
_EXAMPLE = """\
examples:
  posemap train                                      the embedded scene, CPU preset, into runs/room
  posemap train --scene my_capture --out runs/mine
  posemap train --scene my_capture --set apr.steps=2000 --set field.appearance_dim=0 --seed 1 --out runs/mine_1
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scene", default="room", help="`room`, or the path of a capture (default: room)")
    parser.add_argument("--preset", default="cpu", help=f"one of {', '.join(preset_names())} (default: cpu)")
    parser.add_argument("--config", type=Path, action="append", default=[], help="further YAML file over the preset")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one key of the config")
    parser.add_argument("--out", type=Path, help="directory of the run (default: runs/<scene>)")
    parser.add_argument("--seed", type=int, default=0, help="all randomness follows from it (default: 0)")
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
    """Run the pipeline and print its table."""
    config = load_experiment(options.preset, options.config, options.set).resolved()
    identity, name = _scene_name(options.scene)
    out = (options.out or Path(os.environ.get("POSEMAP_RUNS", "runs")) / name).expanduser().resolve()
    run = RunDirectory(out, RunIdentity(identity, options.preset, options.seed, config))
    console = Console() if sys.stdout.isatty() else Console(width=110)
    was_finished = run.is_finished()
    summary = run_pipeline(run, make_progress(options.quiet))
    print_table(summary, console)
    state = "already done" if was_finished else "done"
    console.print(f"{state}: {out}  (open report.html for pictures)", soft_wrap=True)
    return 0


COMMANDS.register("train")(
    Command("train one scene, all stages, resumable", _DESCRIPTION, _EXAMPLE, _add_arguments, train)
)
