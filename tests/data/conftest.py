"""Fixtures of the data tests: a small capture on disk that a test may damage, and a small traced room."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import Scene, load_room
from posemap_fast.geometry import look_at

OPENCV_TO_OPENGL = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))


@dataclass
class Capture:
    """A transforms.json capture in `folder`; change `content` or `split` and call `write`."""

    folder: Path
    content: dict[str, Any]
    split: dict[str, Any] | None = None
    c2w: list[torch.Tensor] = field(default_factory=list)  # OpenCV

    def write(self) -> str:
        """Write the JSON files; returns the folder as a scene spec."""
        (self.folder / "transforms.json").write_text(json.dumps(self.content))
        if self.split is not None:
            (self.folder / "split.json").write_text(json.dumps(self.split))
        return str(self.folder)

    def image(self, index: int) -> Path:
        """The image file of one frame."""
        return self.folder / self.content["frames"][index]["file_path"]


def make_capture(folder: Path, n_views: int = 8, width: int = 40, height: int = 30) -> Capture:
    """Cameras on a circle that look at its centre, random images, a full split.json."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    frames, poses = [], []
    for index in range(n_views):
        angle = 2 * math.pi * index / n_views
        centre = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle), 0.5], dtype=torch.float64)
        c2w = look_at(centre, torch.zeros(3).double(), torch.tensor([0.0, 0.0, 1.0]).double())
        name = f"images/frame_{index}.jpg"
        picture = cv2.resize(rng.integers(0, 255, (5, 7, 3), np.uint8), (width, height))
        cv2.imwrite(str(folder / name), picture)
        frames.append({"file_path": name, "transform_matrix": (c2w @ OPENCV_TO_OPENGL).tolist()})
        poses.append(c2w)
    names = [frame["file_path"] for frame in frames]
    content = {"w": width, "h": height, "fl_x": 35.0, "fl_y": 36.0, "cx": 19.0, "cy": 16.0, "frames": frames}
    split = {"train": names[:4], "val": names[4:5], "test": names[5:7], "rule": "by hand"}
    return Capture(folder, content, split, poses)


@pytest.fixture
def capture(tmp_path: Path) -> Capture:
    """Eight views: 4 train, 1 val, 2 test, 1 in no list; not yet written."""
    return make_capture(tmp_path / "capture")


@pytest.fixture(scope="session")
def small_room() -> Scene:
    """The room at 80 x 60 with 40 training views."""
    return load_room(n_train=40, n_val=4, n_test=6, n_unlabelled=3, width=80, height=60)


@pytest.fixture
def capture_maker() -> Callable[..., Capture]:
    """`make_capture`, for tests that need a capture elsewhere or of another size."""
    return make_capture
