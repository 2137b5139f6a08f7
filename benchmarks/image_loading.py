"""Loads a capture of many images and draws batches: memory, times, and their share of the cpu preset's steps.

    python benchmarks/image_loading.py --images 10000 --folder /tmp/many [--json F]

Writes synthetic JPEG files (a few distinct pictures under many names) with poses on a path into FOLDER once, then works
in a process of its own, whose peak memory is reported: all of it, and without the pages of the image file, which belong
to the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posemap_fast.data import load_scene
from posemap_fast.experiment import load_experiment
from posemap_fast.fields import NeRFP
from posemap_fast.geometry import SceneFrame
from posemap_fast.render import Renderer
from posemap_fast.train import FieldStage, TrainingViews

WIDTH, HEIGHT, DISTINCT = 640, 480, 50


def write_capture(folder: Path, count: int) -> None:
    """`count` images of `DISTINCT` pictures and transforms.json, unless they are there."""
    if (folder / "transforms.json").is_file():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, frames = np.random.default_rng(0), []
    pictures = []
    for _ in range(DISTINCT):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        fine = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
        noisy = np.clip(fine + rng.normal(0, 8, fine.shape), 0, 255).astype(np.uint8)
        pictures.append(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    for index in range(count):
        name = f"images/frame_{index:06d}.jpg"
        (folder / name).write_bytes(pictures[index % DISTINCT])
        angle = 2 * math.pi * index / count
        c, s = math.cos(angle), math.sin(angle)
        pose = [[c, 0, s, 2 * s], [0, 1, 0, 0.1 * math.sin(5 * angle)], [-s, 0, c, 2 * c], [0, 0, 0, 1]]
        frames.append({"file_path": name, "transform_matrix": pose})
    shared = {"w": WIDTH, "h": HEIGHT, "fl_x": 525.0, "fl_y": 525.0, "cx": WIDTH / 2, "cy": HEIGHT / 2}
    (folder / "transforms.json").write_text(json.dumps({**shared, "frames": frames}))


def _status(key: str) -> int:
    """A line of /proc/self/status in MiB."""
    line = next(text for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(key))
    return int(line.split()[1]) >> 10


class PeakWatch:
    """Largest anonymous memory of this process, looked at every 20 ms."""

    def __init__(self) -> None:
        self.anonymous = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.anonymous = max(self.anonymous, _status("RssAnon"))
            time.sleep(0.02)


def seconds(function: Callable[[], object]) -> float:
    """Wall time of a call."""
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def measure(folder: Path, max_side: int) -> dict[str, float]:
    """Load, one epoch of random batches of 8, and 60 steps of stage 1 with the time of their draws apart."""
    watch, found = PeakWatch(), {}
    begin = time.perf_counter()
    scene = load_scene(folder, **({"max_side": max_side} if max_side else {}))
    found["load_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    views = TrainingViews.of(scene.images, scene.c2w, scene.camera)
    found["histograms_s"] = time.perf_counter() - begin
    order = torch.randperm(len(views), generator=torch.Generator().manual_seed(0)).split(8)
    times = sorted(seconds(lambda batch=batch: views.images[batch]) for batch in order)
    found["batch_of_8_ms"] = 1e3 * times[len(times) // 2]
    found["epoch_s"] = sum(times)
    found |= field_steps(views)
    found["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    found["peak_anonymous_mib"] = watch.anonymous
    found["images"] = len(views)
    return found


def field_steps(views: TrainingViews, n_steps: int = 60) -> dict[str, float]:
    """Median time of a step of the cpu preset's stage 1 and of the draw of its pixels."""
    config = load_experiment("cpu", overrides=["field.finest_resolution=512"]).resolved()
    frame = SceneFrame(
        scale=0.2,
        rotation=torch.eye(3, dtype=torch.float64),
        offset=torch.full((3,), 0.5, dtype=torch.float64),
        n_cascades=1,
        aabb=torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=torch.float64),
    )
    stage = FieldStage(config.nerf, NeRFP(config.field, frame), Renderer(config.render, frame, 0.01), views, 0)
    draws: list[float] = []
    draw = stage._draw

    def timed_draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        begin = time.perf_counter()
        found = draw(generator)
        draws.append(time.perf_counter() - begin)
        return found

    stage._draw = timed_draw  # type: ignore[method-assign]
    steps = [seconds(lambda k=k: stage.step(k)) for k in range(n_steps)]
    step, drawn = float(np.median(steps[5:])), float(np.median(draws[5:]))
    return {"stage1_step_ms": 1e3 * step, "stage1_draw_ms": 1e3 * drawn, "stage1_draw_share": drawn / step}


def main() -> int:
    """Write the capture, measure in a process of its own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10000, help="number of images (default 10000)")
    parser.add_argument("--folder", type=Path, required=True, help="where the capture is made (about 1 GB)")
    parser.add_argument("--max-side", type=int, default=0, help="working size, 0 = as stored (default)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder, options.max_side)))
        return 0
    write_capture(options.folder, options.images)
    command = [sys.executable, __file__, "--folder", str(options.folder), "--max-side", str(options.max_side)]
    done = subprocess.run([*command, "--measure"], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    for key, value in found.items():
        print(f"{key:<22}{value:12.3f}")
    if options.json:
        options.json.write_text(json.dumps({"schema": 1, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
