"""`posemap render`: pictures of a trained map at given poses."""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import torch

from posemap_fast.backends import named_device
from posemap_fast.commands.base import COMMANDS, Command, add_device_argument
from posemap_fast.errors import DatasetError
from posemap_fast.eval import read_trajectory
from posemap_fast.files import atomic_path
from posemap_fast.localize import SceneMap
from posemap_fast.progress import make_progress
from posemap_fast.render import render_views

__all__ = ["render"]

_DESCRIPTION = """\
Render a trained map at the poses of a file (TUM lines, or "name x y z qw qx qy qz"): colour as PNG, and with
--depth the distance along the ray in millimetres of the scene's unit as 16-bit PNG.
"""
_EXAMPLE = "example:\n  posemap render runs/room --poses runs/room/poses_test_gt.txt --out renders --limit 5"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory, or a .map file")
    parser.add_argument("--poses", type=Path, required=True, help="file of camera-to-world poses")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--limit", type=int, default=0, help="render only the first N poses")
    parser.add_argument("--depth", action="store_true", help="also write depth")
    parser.add_argument("--backbone", help="field backbone to render with (default: the one of the map)")
    add_device_argument(parser)


def _write_png(path: Path, pixels: torch.Tensor) -> None:
    done, data = cv2.imencode(".png", pixels.cpu().numpy())
    assert done
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def render(options: argparse.Namespace) -> int:
    """Write one picture per pose."""
    path = options.run / "scene.map" if options.run.is_dir() else options.run
    device = named_device(options.device)
    scene_map = SceneMap.load(path, options.backbone, device)
    trajectory = read_trajectory(options.poses)
    count = min(options.limit or len(trajectory.keys), len(trajectory.keys))
    if not bool(torch.isfinite(trajectory.c2w[:count]).all()):
        raise DatasetError(f"{options.poses}: a pose has NaN values; remove that line")
    code = scene_map.nerfp.appearance
    appearance = None if code is None else code(code.mean_histogram[None])
    with make_progress().task("render", total=count) as task:
        for i in range(count):
            view = render_views(
                scene_map.renderer,
                scene_map.nerfp,
                trajectory.c2w[i : i + 1].float().to(device),
                scene_map.camera,
                appearance=appearance,
                with_posemap=False,
            )
            colour = (view.rgb[0].flip(-1) * 255).round().to(torch.uint8)
            name = Path(trajectory.keys[i]).stem.replace("/", "_")
            _write_png(options.out / f"{name}.png", colour)
            if options.depth:
                depth = (view.depth[0] * 1000).clamp(0, 65535).round().to(torch.int32).cpu().numpy().astype("uint16")
                _write_png(options.out / f"{name}_depth.png", torch.from_numpy(depth))
            task.update(i + 1)
    return 0


COMMANDS.register("render")(
    Command("pictures of a trained map at given poses", _DESCRIPTION, _EXAMPLE, _add_arguments, render)
)
