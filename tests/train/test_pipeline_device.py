"""A whole run keeps its tensors on the device: every stage, what is measured between them, and refined answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from posemap_fast import results, stages
from posemap_fast.apr import posemap_refiner
from posemap_fast.cli import main
from posemap_fast.experiment import load_experiment
from posemap_fast.pipeline import run_pipeline
from posemap_fast.progress import NoProgress
from posemap_fast.run_dir import RunDirectory, RunIdentity

from .pretend_device import DEVICE, Pretended

LEAST = [
    *("data.room_train=6", "data.room_test=3", "data.room_width=32", "data.network_side=0", "data.unlabelled_every=3"),
    *("field.log2_hashmap_size=12", "render.steps_per_unit=24", "render.occupancy.resolution=16"),
    *("nerf.steps=3", "nerf.samples_per_step=256", "posemap.steps=1", "posemap.batch=2", "network.input_size=[24,32]"),
    *("apr.steps=1", "apr.batch=2", "apr.rvs_batch=1", "align.steps=1", "align.batch=2"),
    *("align.image_pose.steps=1", "align.image_pose.rows=8", "threads=1"),
    *("field.backbone=native", "render.backend=native"),
]


@pytest.fixture
def run(device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    """A run to be made on the device."""
    monkeypatch.setattr(stages, "_UNSEEN_BATCHES", 2)
    monkeypatch.setattr(posemap_refiner, "_FIT_STEPS", 10)
    config = load_experiment("smoke", overrides=[*LEAST, "device=cpu"]).resolved()
    object.__setattr__(config, "device", str(device))
    if device == DEVICE:  # pretended tensors have no storage to write, and cannot be read into
        monkeypatch.setattr(torch, "save", _save(torch.save))
        monkeypatch.setattr(torch, "load", _load(torch.load))
        monkeypatch.setattr(results, "environment", lambda device: {})
    return RunDirectory(tmp_path / "run", RunIdentity("room", "smoke", 0, config))


def _plain(value: Any) -> Any:
    """Nested values with the tensors that pretended ones stand for."""
    if isinstance(value, torch.Tensor):
        return value.inner.clone() if isinstance(value, Pretended) else value.detach()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _save(save: Any) -> Any:
    return lambda value, file: save(_plain(value), file)


def _load(load: Any) -> Any:
    def read(file: Any, map_location: Any = None, **options: Any) -> Any:
        found = load(file, map_location="cpu", **options)
        is_there = map_location is not None and torch.device(map_location) == DEVICE
        return {key: value.to(DEVICE) for key, value in found.items()} if is_there else found

    return read


def test_a_whole_run_and_the_commands_that_use_it(run: RunDirectory, capsys, tmp_path: Path) -> None:
    summary = run_pipeline(run, NoProgress())
    for answers in ("apr", "aligned", "refined"):
        assert np.isfinite(summary[answers]["median_t_m"]), answers
    name, root = run.identity.config.device, str(run.root)
    if name == "cuda":
        assert summary["environment"]["kernels"] == "native" and summary["environment"]["cuda"]
    else:
        name = "cpu"  # files are read to devices that are there
    query, poses, renders = tmp_path / "query.png", run.root / "poses_test_gt.txt", tmp_path / "renders"
    cv2.imwrite(str(query), np.full((24, 32, 3), 128, np.uint8))
    capsys.readouterr()
    assert main(["localize", root, str(query), "--refine", "--device", name]) == 0
    assert np.isfinite(json.loads(capsys.readouterr().out)["t"]).all()
    assert main(["render", root, "--poses", str(poses), "--out", str(renders), "--depth", "--device", name]) == 0
    assert len(list(renders.iterdir())) == 4
    words = ["--starts", "0.1,5", "--steps", "2", "--poses-used", "2", "--device", name]
    assert main(["basin", root, *words]) == 0
