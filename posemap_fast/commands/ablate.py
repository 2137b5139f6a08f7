"""`posemap ablate`: a grid of configuration changes, scenes and seeds, and its table."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from posemap_fast.ablation import Ablation, load_ablation, run_ablation
from posemap_fast.ablation_results import summarize_pictures, summarize_rows
from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.experiment import load_experiment
from posemap_fast.files import write_text
from posemap_fast.progress import make_progress
from posemap_fast.resources import resource_dir
from posemap_fast.results import environment, git_commit, shown_arguments

__all__ = ["ablate"]

_DESCRIPTION = """\
Run the rows of an ablation file on scenes and seeds and print median errors with their spread over the seeds, and
each row's ratio to the reference row. Rows share maps and random views wherever they agree in what decides them, so a
row costs one network. Finished rows are kept: interrupt it whenever you like, add seeds or rows, run it again.

CONFIG is a YAML file, or the name of one that comes with the package (configs/ablations):
  title: what the table shows
  preset: cpu                         the configuration that all rows start from
  set: [apr.steps=900]                changes common to all rows
  rows:
    full: {}
    without L_posemap: {set: [apr.weights.posemap=0]}
    aligned: {align: inductive}       also align on unlabelled frames, and score that
With `intervals: true` the error intervals of the networks are judged too, as those of a localizer.
With `measure: pictures` only the fields are trained, and their renders at the test poses are judged.
"""
_EXAMPLE = """\
examples:
  posemap ablate losses --seeds 0,1,2 --out runs/losses
  posemap ablate losses --scene kitchen=/data/redkitchen --scene room --seeds 0 --rows "full,pose only"
  posemap ablate mine.yaml --set apr.steps=300 --markdown table.md"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="ablation file, or the name of one in configs/ablations")
    parser.add_argument(
        "--scene",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="`room` or a capture; may be repeated (default: the file's)",
    )
    parser.add_argument("--seeds", default="0", metavar="A,B", help="comma-separated (default: 0)")
    parser.add_argument("--rows", metavar="A,B", help="only these rows")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override for all rows")
    parser.add_argument("--out", type=Path, help="folder of maps and results (default: runs/ablate_<name>)")
    parser.add_argument("--markdown", type=Path, help="also write the table here, with command, commit and machine")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the table")


def ablate(options: argparse.Namespace) -> int:
    """Run what is missing, print the table, write results.json."""
    path = _config_file(options.config)
    ablation = load_ablation(path)
    seeds = _seeds(options.seeds)
    named = [_named_scene(text) for text in options.scene]
    named = named or [_named_scene(text, path.resolve().parent) for text in ablation.scenes]
    scenes = dict(named)
    if len(scenes) < len(named):
        raise ConfigError(f"scenes: two have the same name ({', '.join(name for name, _ in named)}); give NAME=PATH")
    out = (options.out or Path("runs") / f"ablate_{path.stem}").expanduser().resolve()
    rows = [row.strip() for row in (options.rows or "").split(",") if row.strip()]
    meter = make_progress(options.quiet)
    results = run_ablation(ablation, scenes, seeds, out, meter, rows=rows, overrides=options.set)
    summary = list(_summaries(ablation, results))
    report = {"schema": 1, "title": ablation.title, "seeds": seeds, "rows": summary, "commit": git_commit()}
    write_text(out / "results.json", json.dumps(report, indent=1) + "\n")
    console = Console() if sys.stdout.isatty() else Console(width=140)
    for scene in scenes:
        console.print(_table(ablation, [row for row in summary if row["scene"] == scene], scene))
    if options.markdown:
        device = load_experiment(ablation.preset, (), [*ablation.set, *options.set]).resolved().device
        write_text(options.markdown, _markdown(ablation, summary, list(scenes), environment(torch.device(device))))
    console.print(f"results: {out / 'results.json'}", soft_wrap=True)
    return 0


def _config_file(name: str) -> Path:
    known = resource_dir("configs") / "ablations"
    for path in (Path(name), known / f"{name}.yaml"):
        if path.is_file():
            return path
    names = ", ".join(sorted(found.stem for found in known.glob("*.yaml")))
    raise ConfigError(f"{name}: no such file, and no ablation of that name (known: {names})")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: give whole numbers with commas between, such as 0,1,2") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text}: seeds must be different and >= 0")
    return seeds


def _named_scene(text: str, folder: Path = Path()) -> tuple[str, str]:
    """(short name, `room` or absolute path); a path is relative to `folder`."""
    name, _, given = text.rpartition("=")
    if given == "room":
        return name or given, given
    path = (folder / Path(given).expanduser()).resolve()
    if not path.exists():
        raise DatasetError(f"--scene {text}: no such file or folder; give `room`, a capture, or NAME=capture")
    return name or (path.parent.name if path.is_file() else path.name), str(path)


def _summaries(ablation: Ablation, results: Sequence[Any]) -> Iterator[dict[str, Any]]:
    if ablation.measure == "pictures":
        return summarize_pictures(results, ablation.reference_row)
    return summarize_rows(results, ablation.reference_row, ablation.outliers)


_COLUMNS = ("row", "median t", "median r (deg)", "ratio t", "ratio r", "seconds", "seeds")
_TAIL = "90 % below (t / r)"  # of refined answers: most go home from anywhere, and medians do not tell of the rest
_SHARES = {  # key of a row's trust -> column
    "inside_50": "in the 50 % interval (t / r)",
    "inside_90": "in the 90 % interval",
    "surest": "p90 of the surest half",
    "best": "p90 of the best half",
}
_PICTURE_COLUMNS = ("row", "PSNR (dB)", "gain (dB)", "SSIM", "samples per ray", "seconds", "seeds")


def _cells(ablation: Ablation, row: dict[str, Any]) -> list[str]:
    if ablation.measure == "pictures":
        return [
            row["row"],
            f"{row['psnr_db']:.2f} ± {row['spread_db']:.2f}",
            f"{row['gain_db']:+.2f}",
            f"{row['ssim']:.3f}",
            f"{row['samples_per_ray']:.1f}",
            f"{row['seconds']:.0f}",
            str(row["n_seeds"]),
        ]
    unit = "m" if row["metric"] else "u"
    cells = [
        row["row"],
        f"{row['median_t']:.3f} ± {row['spread_t']:.3f} {unit}",
        f"{row['median_r_deg']:.2f} ± {row['spread_r_deg']:.2f}",
        f"{row['ratio_t']:.2f}",
        f"{row['ratio_r']:.2f}",
        f"{row['seconds']:.0f}" if row["seconds"] else "-",
        str(row["n_seeds"]),
    ]
    if _has_refined(ablation):
        cells.append(f"{row['p90_t']:.3f} {unit} / {row['p90_r_deg']:.2f}")
    if ablation.intervals:
        trust = row.get("trust")
        shares = [f"{100 * trust['t'][key]:.0f} / {100 * trust['r'][key]:.0f} %" for key in _SHARES] if trust else []
        cells += shares or ["-"] * len(_SHARES)
    if ablation.outliers:
        cells.append(f"{row['outlier_t']:.3f} {unit} / {row['outlier_r_deg']:.2f}")
        growth = (row[f"outlier_{key}"] / max(row[f"mean_{key}"], 1e-12) for key in ("t", "r_deg"))
        cells.append(" / ".join(f"{ratio:.2f}" for ratio in growth))
    return cells


def _has_refined(ablation: Ablation) -> bool:
    return any(row.refine for row in ablation.rows.values())


def _columns(ablation: Ablation) -> list[str]:
    if ablation.measure == "pictures":
        return list(_PICTURE_COLUMNS)
    tail = [_TAIL] if _has_refined(ablation) else []
    shares = list(_SHARES.values()) if ablation.intervals else []
    outliers = ablation.outliers
    far = f"{outliers:.0f} farthest" if outliers >= 1 else f"farthest {100 * outliers:g} %"
    return [*_COLUMNS, *tail, *shares, *([f"mean, {far}", "over that of all"] if outliers else [])]


def _table(ablation: Ablation, rows: Sequence[dict[str, Any]], scene: str) -> Table:
    table = Table(title=f"{scene}: {ablation.title} (reference: {ablation.reference_row})")
    for column in _columns(ablation):
        table.add_column(column, justify="left" if column == "row" else "right")
    for row in rows:
        table.add_row(*_cells(ablation, row))
    return table


_EXPLANATIONS = {
    "poses": (
        "Median over the seeds of each run's median over the test views, ± half the range over the seeds; a ratio",
        "below 1 is better. Seconds are those of training the network, its random views included.",
    ),
    "pictures": (
        "Renders at the test poses: median over the seeds of each run's mean over the test views, ± half the range",
        "over the seeds. Seconds are those of training the field.",
    ),
}


def _markdown(
    ablation: Ablation, rows: Sequence[dict[str, Any]], scenes: Sequence[str], machine: dict[str, Any]
) -> str:
    place = machine["cuda"] or f"{machine['processor']}, {machine['threads']} threads"
    lines = [
        f"# {ablation.title}",
        "",
        *_EXPLANATIONS[ablation.measure],
        f"Ratios and gains are those over the row `{ablation.reference_row}`.",
        "",
        f"- command: `posemap {shlex.join(shown_arguments())}`",
        f"- commit {git_commit()}, torch {machine['torch']}, {place}",
    ]
    if ablation.intervals:
        lines.append(
            "- p90 of a half: its 90th percentile of the error over that of all views; no sigma beats the best"
        )
    lines += [f"- {name}: {row.note}" for name, row in ablation.rows.items() if row.note]
    for scene in scenes:
        lines += ["", f"## {scene}", "", f"| {' | '.join(_columns(ablation))} |"]
        lines.append(f"|{'---|' * len(_columns(ablation))}")
        lines += [f"| {' | '.join(_cells(ablation, row))} |" for row in rows if row["scene"] == scene]
    return "\n".join(lines) + "\n"


COMMANDS.register("ablate")(Command("rows x scenes x seeds, one table", _DESCRIPTION, _EXAMPLE, _add_arguments, ablate))
