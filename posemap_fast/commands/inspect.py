"""`posemap inspect`: what is this file or dataset, and is it sane?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from posemap_fast.commands.base import COMMANDS, Command
from posemap_fast.data import Scene, estimate_frame, load_scene
from posemap_fast.environment import Component, Environment, gather_environment
from posemap_fast.errors import DatasetError
from posemap_fast.files import LOCALIZER_MAGIC, MAP_MAGIC, read_container
from posemap_fast.geometry import rotation_angle_deg

__all__ = ["inspect"]

_DESCRIPTION = """\
Say what a file or dataset is and whether it is whole: a scene map, a localizer, a run directory, or a capture
(counts, camera, extent, how far the test views are from the training views, the automatic scene box).
"""
_EXAMPLE = """\
examples:
  posemap inspect my_capture
  posemap inspect runs/room/scene.map
  posemap inspect --environment            what can run here, what is missing, and the line that installs it
  posemap inspect --environment --json"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="file or folder, or `room`")
    parser.add_argument("--environment", action="store_true", help="versions, kernels and devices of this machine")
    parser.add_argument("--json", action="store_true", help="with --environment: JSON instead of a table")


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


def describe_scene(scene: Scene) -> dict[str, Any]:
    """Counts, camera, extent, distances between test and training views, and the automatic frame."""
    train, test = scene.c2w[scene.views("train")], scene.c2w[scene.views("test")]
    distance = (test[:, None, :3, 3] - train[None, :, :3, 3]).norm(dim=-1)
    nearest = distance.argmin(dim=1)
    angle = rotation_angle_deg(test[:, :3, :3], train[nearest, :3, :3])
    estimate = estimate_frame(scene)
    return {
        "kind": "dataset",
        "name": scene.name,
        "views": scene.counts(),
        "split": scene.split_rule,
        "camera": scene.camera.to_dict(),
        "unit": "m" if scene.is_metric else "not metric",
        "camera_box": [scene.c2w[:, :3, 3].amin(0).tolist(), scene.c2w[:, :3, 3].amax(0).tolist()],
        "test_to_nearest_train": {
            "median_distance": float(distance.amin(dim=1).median()),
            "median_angle_deg": float(angle.median()),
        },
        "frame": estimate.rule,
        "fingerprint": scene.fingerprint,
    }


def _environment_rows(found: Environment) -> dict[str, Component]:
    """Everything of the table, one row each."""
    gpus = "\n".join(f"{gpu.name}, capability {gpu.capability}, {gpu.memory_gib} GiB" for gpu in found.gpus)
    return {
        "posemap_fast": Component(found.posemap_fast),
        "Python": Component(f"{found.python} on {found.platform}"),
        "processor": Component(f"{found.processor}, {found.cores} cores"),
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
        description = describe_scene(load_scene(options.target))
    Console().print_json(json.dumps(description))
    return 0


COMMANDS.register("inspect")(
    Command("what a file or dataset is, and whether it is sane", _DESCRIPTION, _EXAMPLE, _add_arguments, inspect)
)
