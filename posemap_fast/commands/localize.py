"""`posemap localize`: images in, poses out, as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from posemap_fast.backends import named_device
from posemap_fast.commands.base import COMMANDS, Command, add_device_argument
from posemap_fast.errors import ConfigError
from posemap_fast.localize import (
    REFINEMENT,
    Localizer,
    PoseRegressor,
    RefinedErrors,
    RefinedRegressor,
    SceneMap,
    read_image,
)

__all__ = ["localize"]

_DESCRIPTION = """\
Answer with the camera pose of each image. One JSON line per image:
  name, c2w (4x4 camera-to-world, OpenCV axes), t (camera centre), q (w, x, y, z), sigma_t_m, sigma_r_deg, ms
sigma is the error that 68 % of such images are meant to stay below. Images must come from the camera of the training
images (any size, same aspect ratio). --refine moves each answer until the map looks like the image from there: several
times closer, and a part of a second each on a CPU; training and `posemap refine RUN` calibrate its
sigma, by validation views.
"""
_EXAMPLE = """\
examples:
  posemap localize runs/room query_1.jpg query_2.png
  posemap localize runs/room query_1.jpg --refine"""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory, or a .pmnet file")
    parser.add_argument("--refine", action="store_true", help="correct the answers by render and compare")
    parser.add_argument("images", type=Path, nargs="+", help="PNG or JPEG files")
    add_device_argument(parser)


def localizer_file(run: Path) -> Path:
    """The localizer named on the command line: the file itself, or the one in a run directory."""
    return run / "localizer.pmnet" if run.is_dir() else run


def _localizer(run: Path, is_refined: bool, device: torch.device) -> Localizer:
    regressor = PoseRegressor.load(localizer_file(run), device)
    if not is_refined:
        return regressor
    if not run.is_dir():
        raise ConfigError(f"{run}: --refine needs the map beside the localizer; give the run directory")
    stored = run / "refined.json"
    errors = RefinedErrors.load(stored) if stored.exists() else None
    if errors is None:
        print(
            f"{run}: no sigma is known for refined answers; 'posemap refine {run}' finds it, or says why not",
            file=sys.stderr,
        )
    config = REFINEMENT if errors is None else errors.config
    return RefinedRegressor(regressor, SceneMap.load(run / "scene.map", device=device), config, errors)


def localize(options: argparse.Namespace) -> int:
    """Print one JSON line per image."""
    localizer = _localizer(options.run, options.refine, named_device(options.device))
    images = [(path, read_image(path, localizer.camera)) for path in options.images]
    for path, image in images:
        print(json.dumps(localizer.localize(image).to_dict(str(path))), flush=True)
    return 0


COMMANDS.register("localize")(
    Command("camera poses of images, as JSON lines", _DESCRIPTION, _EXAMPLE, _add_arguments, localize)
)
