"""Trains the same scene with every field backbone and render backend that runs here, and compares PSNR and speed.

    python benchmarks/gpu_backbones.py [--steps 600] [--device cuda] [--json F]

Rows differ in the backend alone: same images, same random numbers, same schedule. Exit code 1: a backbone's PSNR is
more than 0.3 dB from that of `native`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from posemap_fast.backends import why_not
from posemap_fast.data import estimate_frame, load_scene
from posemap_fast.eval import psnr_db
from posemap_fast.experiment import load_experiment
from posemap_fast.fields import NeRFP
from posemap_fast.render import Renderer, render_views
from posemap_fast.train import FieldStage, TrainingViews

PAIRS = [("native", "native"), ("tcnn", "native"), ("native", "nerfacc"), ("tcnn", "nerfacc"), ("reference", "native")]
ALLOWED_DB = 0.3
REFERENCE_STEPS = 40  # of the slow reference: only that it runs


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the host's clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(field: str, render: str, steps: int, device: torch.device, scene: Any, estimate: Any) -> dict[str, Any]:
    """One row: train stage 1 and render the test views."""
    config = load_experiment("smoke" if device.type == "cpu" else "gpu")
    frame = estimate.frame
    sizes = dataclasses.replace(config.field, backbone=field, finest_resolution=512, log2_hashmap_size=16)
    torch.manual_seed(0)
    nerfp = NeRFP(sizes, frame).to(device)
    renderer = Renderer(dataclasses.replace(config.render, backend=render), frame, estimate.near)
    renderer.occupancy.to(device)
    views = {name: _views(scene, name).to(device) for name in ("train", "test")}
    schedule = dataclasses.replace(config.nerf, steps=steps)
    stage = FieldStage(schedule, nerfp, renderer, views["train"], seed=0)
    begin = time.perf_counter()
    for k in range(steps):
        stage.step(k)
    synchronize(device)
    seconds = time.perf_counter() - begin
    renderer.set_coarseness(1.0)
    codes = nerfp.appearance_code(views["test"].histograms)
    errors = []
    for i in range(min(8, len(views["test"]))):
        appearance = None if codes is None else codes[i : i + 1]
        view = render_views(
            renderer, nerfp, views["test"].c2w[i : i + 1], scene.camera, appearance=appearance, with_posemap=False
        )
        errors.append(psnr_db(view.rgb[0], views["test"].images[i].float() / 255))
    rate = stage.totals["rays"] / seconds
    return {
        "field": field,
        "render": render,
        "steps": steps,
        "psnr_db": sum(errors) / len(errors),
        "ms_per_step": 1e3 * seconds / steps,
        "rays_per_s": rate,
    }


def _views(scene: Any, split: str) -> TrainingViews:
    index = torch.tensor(scene.views(split))
    return TrainingViews.of(scene.images.select(index), scene.c2w[index], scene.camera)


def main() -> int:
    """Run the pairs that can run here; print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", metavar="F", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    scene = load_scene("room", n_train=60, n_test=8, width=160, height=120)
    estimate = estimate_frame(scene)
    rows, left_out = [], {}
    for field, render in PAIRS:
        reasons = [reason for name in (field, render) if (reason := why_not(name, device))]
        if reasons:
            left_out[f"{field}+{render}"] = reasons[0]
            continue
        steps = min(arguments.steps, REFERENCE_STEPS) if field == "reference" else arguments.steps
        rows.append(train(field, render, steps, device, scene, estimate))
        print(rows[-1], flush=True)
    for pair, reason in left_out.items():
        print(f"not run: {pair}: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"schema": 1, "results": rows, "left_out": left_out}, indent=1) + "\n")
    full = [row for row in rows if row["steps"] == arguments.steps]
    return 0 if all(abs(row["psnr_db"] - full[0]["psnr_db"]) <= ALLOWED_DB for row in full) else 1


if __name__ == "__main__":
    sys.exit(main())
