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
as infinitely wrong. Either the directory of a run that `posemap train` finished (the network's answers, and those that
the map corrected, unless it was told not to; recall at distances in metres where the scene is metric), or two files of
lines
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
    parser.add_argument(
        "--json",
        type=Path,
        help="also write the metrics to this file (of folders: a list; of a run also of refined answers, as `refined`)",
    )


def _print(columns: dict[str, dict[str, Any]], unit: str, title: str) -> None:
    """A row per metric, a column per file of answers."""
    table = Table("metric", title=title)
    for name in columns:
        table.add_column(escape(name), justify="right")
    for key in ("n_test", "n_missing", "median_t_m", "median_r_deg", "mean_t_m", "mean_r_deg"):
        values = [metrics[key] for metrics in columns.values()]
        shown = [str(value) if isinstance(value, int) else f"{value:.4f}" for value in values]
        table.add_row(key if unit == "m" else key.replace("_t_m", f"_t ({unit})"), *shown)
    for key in RECALL_THRESHOLDS if unit == "m" else ():
        table.add_row(f"recall {key}", *(f"{100 * metrics['recall'][key]:.1f} %" for metrics in columns.values()))
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


def _evaluate_run(root: Path) -> dict[str, Any]:
    """Print the errors of a run's answers; those of the network, and those of refined ones as `refined`.

    Raises:
        ConfigError: not the directory of a finished run.
    """
    summary, truth, refined = (root / name for name in ("summary.json", "poses_test_gt.txt", "poses_test_refined.txt"))
    if not summary.is_file():
        raise ConfigError(f"{root}: not the directory of a finished run (no summary.json); end it by 'posemap train'")
    columns = {"network": evaluate_files(root / "poses_test.txt", truth)}
    if refined.exists():
        columns["refined"] = evaluate_files(refined, truth)
    is_metric = json.loads(summary.read_text(encoding="utf-8"))["unit"] == "m"
    _print(columns, "m" if is_metric else "units", str(root))
    return columns.pop("network") | columns


def evaluate(options: argparse.Namespace) -> int:
    """Print the metrics; write them with `--json`."""
    predicted, truth = options.pred, options.gt
    found: dict[str, Any] | list[dict[str, Any]]
    if options.run is not None and predicted is None and truth is None:
        found = _evaluate_run(options.run)
    elif options.run is not None or predicted is None or truth is None:
        raise ConfigError("give either a run directory, or both --pred FILE and --gt FILE")
    elif predicted.is_dir() and truth.is_dir():
        found = evaluate_folders(predicted, truth)
        _print_scenes(found, f"{predicted} against {truth}")
    else:
        found = evaluate_files(predicted, truth)
        _print({"value": found}, "m", f"{predicted} against {truth}")
    if options.json is not None:
        write_text(options.json, json.dumps(found, indent=1) + "\n")
    return 0


COMMANDS.register("evaluate")(
    Command("errors of a run, or of pose files", _DESCRIPTION, _EXAMPLE, _add_arguments, evaluate)
)
