"""`posemap evaluate`: the honest error of a run, or of any two pose files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.errors import ConfigError
from posemap_fast.eval.metrics import RECALL_THRESHOLDS
from posemap_fast.eval.trajectory import evaluate_files, evaluate_folders
from posemap_fast.files import write_text

__all__ = ["evaluate"]

_DESCRIPTION = """\
Score poses against the truth: median and mean translation and rotation error, and recall. A missing answer counts
as infinitely wrong. Either a run directory (its poses_test.txt and poses_test_gt.txt), or two files of lines
  timestamp tx ty tz qx qy qz qw      (TUM)    or    name x y z qw qx qy qz
(also as .gz), or two folders of such files with the same names, one file per scene, which gives one row per scene.
Only the difference of prediction and truth counts, so any world and any camera axes will do if both agree.
"""
_EXAMPLE = """\
examples:
  posemap evaluate runs/room
  posemap evaluate --pred mine.txt --gt truth.txt --json errors.json
  posemap evaluate --pred mine/ --gt truth/ --json table.json        mine/chess.txt against truth/chess.txt, ..."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, nargs="?", help="run directory")
    parser.add_argument("--pred", type=Path, help="file of predicted poses, or a folder of them")
    parser.add_argument("--gt", type=Path, help="file of true poses, or a folder of them")
    parser.add_argument("--json", type=Path, help="also write the metrics to this file (of folders: a list)")


def _files(options: argparse.Namespace) -> tuple[Path, Path]:
    if options.run is not None and options.pred is None and options.gt is None:
        return options.run / "poses_test.txt", options.run / "poses_test_gt.txt"
    if options.run is None and options.pred is not None and options.gt is not None:
        return options.pred, options.gt
    raise ConfigError("give either a run directory, or both --pred FILE and --gt FILE")


def _print(metrics: dict[str, Any], title: str) -> None:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key in ("n_test", "n_missing", "median_t_m", "median_r_deg", "mean_t_m", "mean_r_deg"):
        value = metrics[key]
        table.add_row(key, str(value) if isinstance(value, int) else f"{value:.4f}")
    for key, share in metrics["recall"].items():
        table.add_row(f"recall {key}", f"{100 * share:.1f} %")
    Console().print(table)


def _print_scenes(rows: list[dict[str, Any]], title: str) -> None:
    """One row per scene."""
    table = Table("scene", title=title)
    for name in (
        "n",
        "missing",
        "median m",
        "median deg",
        *(f"{key.replace('_', ' ')} %" for key in RECALL_THRESHOLDS),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        counts = str(row["n_test"]), str(row["n_missing"])
        recall = (f"{100 * row['recall'][key]:.1f}" for key in RECALL_THRESHOLDS)
        table.add_row(escape(row["scene"]), *counts, f"{row['median_t_m']:.3f}", f"{row['median_r_deg']:.2f}", *recall)
    Console().print(table)


def evaluate(options: argparse.Namespace) -> int:
    """Print the metrics; write them with `--json`."""
    predicted, truth = _files(options)
    title = f"{predicted} against {truth}"
    found: dict[str, Any] | list[dict[str, Any]]
    if predicted.is_dir() and truth.is_dir():
        found = evaluate_folders(predicted, truth)
        _print_scenes(found, title)
    else:
        found = evaluate_files(predicted, truth)
        _print(found, title)
    if options.json is not None:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    return 0


COMMANDS.register("evaluate")(
    Command("errors of a run, or of pose files", _DESCRIPTION, _EXAMPLE, _add_arguments, evaluate)
)
