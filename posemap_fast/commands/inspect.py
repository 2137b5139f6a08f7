"""`posemap inspect`: what is this file or dataset, and is it sane?"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.data.dataset_report import report_dataset
from posemap_fast.environment import Component, Environment, gather_environment
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.eval.top_down import check_picture, draw_top_down
from posemap_fast.files import LOCALIZER_MAGIC, MAP_MAGIC, read_container

__all__ = ["inspect"]

_DESCRIPTION = """\
Say what a file or dataset is and whether it is whole: a scene map, a localizer, a run directory, or a dataset.

Of a dataset it prints, as JSON: views per split and frames left out, stored sizes and cameras, whether the poses are
rigid and fit the images (epipolar distances of matches, also for other conventions and focal lengths), the extent of
the cameras, how far the test views are from the training views, damaged, doubled, blurred, black and blown-out
images, a dark frame around them, the automatic scene box, and under `problems` one sentence for each finding that
deserves a look.
"""
_EXAMPLE = """\
examples:
  posemap inspect my_capture --picture cameras.png
  posemap inspect 7scenes/redkitchen --gt dslam --fast
  posemap inspect runs/room/scene.map
  posemap inspect --environment            what can run here, what is missing, and the line that installs it
  posemap inspect --environment --json"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="file or folder, or `room`")
    parser.add_argument("--environment", action="store_true", help="versions, kernels and devices of this machine")
    parser.add_argument("--json", action="store_true", help="with --environment: JSON instead of a table")
    parser.add_argument("--dataset", help="format of the dataset (default: recognised by its files)")
    parser.add_argument("--gt", choices=("sfm", "dslam"), help="ground truth, for datasets that have two")
    parser.add_argument("--fast", action="store_true", help="do not check every image, only what the poses need")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the dataset from above (png, svg, pdf)")


def describe_file(path: Path) -> dict[str, Any] | None:
    """Header and tensor sizes of a map or localizer (checksum verified); None for another kind of file."""
    with path.open("rb") as file:
        magic = file.read(8)
    if magic not in (MAP_MAGIC, LOCALIZER_MAGIC):
        return None
    header, tensors = read_container(path, magic)
    kind = "scene map" if magic == MAP_MAGIC else "localizer"
    sizes = {"tensors": len(tensors), "parameters": sum(t.numel() for t in tensors.values())}
    return {"kind": kind, "bytes": path.stat().st_size, **sizes, **header}


def _environment_rows(found: Environment) -> dict[str, Component]:
    """Everything of the table, one row each."""
    gpus = "\n".join(f"{gpu.name}, capability {gpu.capability}, {gpu.memory_gib} GiB" for gpu in found.gpus)
    return {
        "posemap_fast": Component(found.posemap_fast),
        "Python": Component(f"{found.python} on {found.platform}"),
        "processor": Component(", ".join([found.processor, f"{found.cores} cores", *found.vector_extensions])),
        "torch": Component(f"{found.torch}, {found.threads} threads"),
        "CUDA runtime": Component(found.cuda_runtime, None if found.cuda_runtime else "torch is a CPU build"),
        "CUDA driver": found.cuda_driver,
        "GPUs": Component(gpus, None if gpus else "torch sees none"),
        "C++ compiler": found.compiler,
        "nvcc": found.nvcc,
        "native CPU kernels": found.native_cpu,
        "native CUDA kernels": found.native_cuda,
        "tinycudann": found.tinycudann,
        "nerfacc": found.nerfacc,
        "pycolmap": found.pycolmap,
    }


def print_environment(found: Environment, console: Console) -> None:
    """A table of what is there and what is not, and below it the mends, unbroken so that they can be copied."""
    rows = _environment_rows(found)
    table = Table("part", "found", "problem", show_lines=False)
    for name, part in rows.items():
        table.add_row(name, escape(part.found or "-"), escape(part.problem or ""))
    console.print(table)
    for name, part in rows.items():
        if part.mend:
            console.print(f"{name}: {escape(part.mend)}", soft_wrap=True, highlight=False)


def describe_dataset(options: argparse.Namespace) -> dict[str, Any]:
    """All checks of a dataset; draws the picture where one is wanted."""
    if options.picture is not None:
        check_picture(options.picture)
    given = {"gt": options.gt} if options.gt else {}
    report = report_dataset(options.target, options.dataset, options.fast, **given)
    if options.picture is not None:
        estimate = report.estimate
        draw_top_down(
            options.picture,
            report.c2w,
            report.cameras,
            report.splits,
            points=estimate.points if estimate else None,
            frame=estimate.frame if estimate else None,
            unit="m" if report.is_metric else "units",
            title=str(report.description["name"]),
        )
    return {key: _finite(value) for key, value in report.description.items()}


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: an infinite error, the mean of nothing."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def inspect(options: argparse.Namespace) -> int:
    """Print a description: JSON, but for the environment a table unless --json is given."""
    if options.environment:
        found = gather_environment()
        if options.json:
            Console().print_json(json.dumps(found.to_dict()))
        else:
            print_environment(found, Console())
    if options.target is None:
        if not options.environment:
            raise DatasetError("nothing to inspect; give a file, a folder, `room` or --environment")
        return 0
    path = Path(options.target)
    description = describe_file(path) if path.is_file() else None
    if description is None and (path / "summary.json").is_file():
        description = {"kind": "run", **json.loads((path / "summary.json").read_text(encoding="utf-8"))}
    if description is None:
        description = describe_dataset(options)
    elif options.picture is not None:
        raise ConfigError(f"--picture draws a dataset; {path} is a {description['kind']}")
    Console().print_json(json.dumps(description))
    return 0


COMMANDS.register("inspect")(
    Command("what a file or dataset is, and whether it is sane", _DESCRIPTION, _EXAMPLE, _add_arguments, inspect)
)
