"""`posemap basin`: how far the PoseMap loss of a trained map leads home."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from posemap_fast.backends import named_device
from posemap_fast.commands.base import COMMANDS, Command, add_device_argument
from posemap_fast.errors import ConfigError
from posemap_fast.eval import read_trajectory
from posemap_fast.eval.basin import BASIN_STARTS, draw_basin, measure_basin
from posemap_fast.eval.top_down import check_picture
from posemap_fast.files import write_text
from posemap_fast.localize import SceneMap
from posemap_fast.progress import make_progress

__all__ = ["basin"]

_DESCRIPTION = """\
Displace true poses by known amounts and follow the gradient of the PoseMap loss, without any network or image.
Printed is the share of walks that end nearer than half their start error, in translation and in rotation: the basin
of attraction of the map's PoseMaps. A wide one means that L_posemap is a useful teacher and that poses can be refined.
"""
_EXAMPLE = """\
examples:
  posemap basin runs/room --picture basin.png
  posemap basin runs/kitchen --starts 0.1,5 0.2,10 0.4,20 --poses-used 168 --json basin.json
"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory (its test poses are used), or a .map file with --poses")
    parser.add_argument("--poses", type=Path, help="file of true camera-to-world poses (default: the run's test poses)")
    parser.add_argument("--poses-used", type=int, default=48, help="at most this many, evenly spread (default: 48)")
    parser.add_argument("--starts", nargs="+", metavar="T,DEG", help="start displacements in scene units and degrees")
    parser.add_argument("--steps", type=int, default=80, help="steps of Adam (default: 80)")
    parser.add_argument("--loss", choices=["l2", "cosine"], default="l2", help="distance of PoseMaps (default: l2)")
    parser.add_argument("--seed", type=int, default=0, help="of the displacements (default: 0)")
    parser.add_argument("--picture", type=Path, help="also draw start and end errors (.png, .svg or .pdf)")
    parser.add_argument("--json", type=Path, help="also write the shares and medians to this file")
    add_device_argument(parser)


def _starts(texts: list[str] | None) -> list[tuple[float, float]]:
    if texts is None:
        return list(BASIN_STARTS)
    starts = []
    for text in texts:
        try:
            t, r = (float(part) for part in text.split(","))
        except ValueError as error:
            raise ConfigError(f"--starts {text}: give distance and angle as T,DEG, such as 0.1,5") from error
        starts.append((t, r))
    return starts


def basin(options: argparse.Namespace) -> int:
    """Measure, print, and write what was asked for."""
    if not options.run.exists():
        raise ConfigError(f"{options.run}: no such run directory or map")
    if options.picture:
        check_picture(options.picture)
    is_run = options.run.is_dir()
    poses = options.poses or (options.run / "poses_test_gt.txt" if is_run else None)
    if poses is None:
        raise ConfigError(f"{options.run}: a map has no poses of its own; give --poses FILE")
    if options.poses_used < 1 or options.steps < 1:
        raise ConfigError("--poses-used and --steps must be >= 1")
    starts = _starts(options.starts)
    device = named_device(options.device)
    scene_map = SceneMap.load(options.run / "scene.map" if is_run else options.run, device=device)
    c2w = read_trajectory(poses).c2w.float().to(device)
    index = torch.linspace(0, len(c2w) - 1, min(options.poses_used, len(c2w))).round().long()
    rows = measure_basin(
        scene_map.renderer,
        scene_map.nerfp,
        scene_map.camera,
        c2w[index],
        starts,
        make_progress(),
        n_steps=options.steps,
        loss=options.loss,
        seed=options.seed,
    )
    table = Table(title=f"{scene_map.name}: walks down the PoseMap loss ({options.loss}) from {len(index)} poses")
    for column in ("start t", "start r (deg)", "came home", "median end t", "median end r (deg)"):
        table.add_column(column, justify="right")
    report = []
    for row in rows:
        t, r = float(row.end_t.median()), float(row.end_r_deg.median())
        table.add_row(f"{row.start_t:g}", f"{row.start_r_deg:g}", f"{100 * row.share:.1f} %", f"{t:.4f}", f"{r:.3f}")
        values = {"start_t": row.start_t, "start_r_deg": row.start_r_deg, "share_home": row.share}
        report.append(values | {"median_t": t, "median_r_deg": r, "n": len(index), "loss": options.loss})
    Console().print(table)
    if options.json:
        write_text(options.json, json.dumps(report, indent=1) + "\n")
    if options.picture:
        draw_basin(options.picture, rows, unit="units")
    return 0


COMMANDS.register("basin")(
    Command("how far the PoseMap loss leads home", _DESCRIPTION, _EXAMPLE, _add_arguments, basin)
)
