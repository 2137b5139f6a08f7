"""All scenes of a benchmark dataset, one run each, and one table beside the published figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.eval import PUBLISHED
from posemap_fast.files import write_text
from posemap_fast.registry import Registry

__all__ = ["SUITES", "Suite", "print_suite", "run_suite", "scene_folders"]


@dataclass(frozen=True)
class Suite:
    """The scenes of a dataset, as folders below its root."""

    scenes: tuple[str, ...]
    ground_truths: tuple[str, ...]  # the first is the default
    paper_overrides: tuple[str, ...] = ()  # constants of the paper for this dataset, with the preset `paper`


SUITES: Registry[Suite] = Registry("benchmark dataset")
SUITES.register("7scenes")(
    Suite(("chess", "fire", "heads", "office", "pumpkin", "redkitchen", "stairs"), ("sfm", "dslam"))
)
SUITES.register("cambridge")(
    Suite(
        ("KingsCollege", "OldHospital", "ShopFacade", "StMarysChurch", "GreatCourt"),
        ("sfm",),
        ("rvs.max_translation=3", "rvs.max_rotation_deg=7.5", "rvs.box_margin=1", "apr.subset=0.5", "align.share=0.5"),
    )
)


def scene_folders(name: str, root: Path, wanted: Sequence[str] = ()) -> dict[str, Path]:
    """Folder of each scene to run: those asked for, or all that are there.

    Raises:
        ConfigError: a scene that the dataset does not have.
        DatasetError: a folder asked for is missing, or none is there.
    """
    suite = SUITES.get(name)
    for scene in wanted:
        if scene not in suite.scenes:
            raise ConfigError(f"--scenes: {name} has no scene '{scene}' (it has {', '.join(suite.scenes)})")
    found = {scene: root / scene for scene in wanted or suite.scenes if (root / scene).is_dir()}
    missing = [scene for scene in wanted if scene not in found]
    if missing:
        raise DatasetError(f"{root / missing[0]}: no such folder; download scene '{missing[0]}' there or leave it out")
    if not found:
        raise DatasetError(f"{root}: holds none of the scenes {', '.join(suite.scenes)}; give the folder above them")
    return found


def run_suite(
    name: str, folders: dict[str, Path], out: Path, train_scene: Callable[[Path, Path], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Train every scene into `out/<scene>`; finished ones return at once. Writes `out/suite.json` after each.

    Args:
        name: dataset.
        folders: scene -> its folder.
        out: folder of the runs.
        train_scene: (scene's folder, run's folder) -> summary.
    """
    summaries: dict[str, dict[str, Any]] = {}
    for scene, folder in folders.items():
        summaries[scene] = train_scene(folder, out / scene)
        report = {"schema": 1, "dataset": name, "scenes": summaries}
        write_text(out / "suite.json", json.dumps(report, indent=1) + "\n")
    return summaries


def print_suite(name: str, summaries: dict[str, dict[str, Any]], console: Console) -> None:
    """One row per scene: ours, then the published figures; every column names its ground truth and protocol."""
    published = PUBLISHED.get(name, ())
    table = Table(title=f"{name}: median error, m / deg")
    table.add_column("scene\n(ground truth, n test)")
    protocol = next(iter(summaries.values()))["protocol"]
    for title in ("mean pose\n(ours)", "nearest view\n(ours)", "APR + PoseMap\n(ours, inductive)"):
        table.add_column(title, justify="right")
    table.add_column(f"  + alignment\n(ours, {protocol})", justify="right")
    is_refined = any("refined" in summary for summary in summaries.values())
    if is_refined:
        table.add_column(f"  + render and compare\n(ours, {protocol})", justify="right")
    for row in published:
        table.add_column(f"{row.method}\n({row.ground_truth}, {row.protocol})", justify="right")
    for scene, summary in summaries.items():
        ours = [
            *(summary["baselines"][key] for key in ("mean_pose", "nearest_view")),
            *(summary[key] for key in ("apr", "aligned")),
            *([summary.get("refined")] if is_refined else []),
        ]
        cells = ["not judged" if m is None else f"{m['median_t_m']:.3f} / {m['median_r_deg']:.2f}" for m in ours]
        theirs = [row.medians.get(scene) for row in published]
        cells += ["not published" if m is None else f"{m[0]:.2f} / {m[1]:.2f}" for m in theirs]
        table.add_row(f"{scene} ({summary['ground_truth'] or '-'}, {summary['apr']['n_test']})", *cells)
    console.print(table)
    truths = {summary["ground_truth"] for summary in summaries.values()} - {""}
    if published and truths - {row.ground_truth for row in published}:
        console.print(
            f"published figures are against {published[0].ground_truth} poses, ours against {', '.join(truths)}: "
            "not comparable; run with --gt to change that"
        )
