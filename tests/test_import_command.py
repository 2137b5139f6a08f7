"""`posemap import`: what comes out, what is refused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.cli import main
from posemap_fast.commands import import_dataset as module
from posemap_fast.data import parse_capture
from posemap_fast.geometry import look_at

NAMES = ["images/b/2.png", "images/a/10.png", "images/a/9.png", "images/c.png"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A transforms.json capture of four images in folders, with points, a split and a lens of its own for each."""
    folder = tmp_path / "source"
    frames = []
    for index, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.random.default_rng(index).integers(0, 255, (30, 40, 3), np.uint8))
        c2w = look_at(torch.tensor([2.0, index, 0.5]).double(), torch.zeros(3).double(), torch.eye(3).double()[2])
        c2w[:, 1:3] *= -1  # OpenGL
        frames.append({"file_path": name, "transform_matrix": c2w.tolist(), "k1": 0.1 / (index + 3), "p2": 1e-3})
    content = {"w": 40, "h": 30, "fl_x": 100 / 3, "fl_y": 34.0, "cx": 19.0, "cy": 16.0, "units": "metres"}
    (folder / "transforms.json").write_text(json.dumps(content | {"frames": frames}))
    split = {"train": ["images/a/9", "images/a/10.png"], "test": ["images/c"], "rule": "by hand", "remark": "text"}
    (folder / "split.json").write_text(json.dumps(split))
    np.savez(folder / "points.npz", xyz=np.arange(12, dtype=np.float32).reshape(4, 3))
    return folder


def run(*arguments: object) -> int:
    return main(["import", *map(str, arguments), "--quiet"])


def same_cameras(a: Path, b: Path) -> bool:
    left, right = parse_capture(a), parse_capture(b)
    assert torch.equal(left.points, right.points)
    pairs = list(zip(left.frames, right.frames, strict=True))
    assert all(x.path.read_bytes() == y.path.read_bytes() for x, y in pairs)
    assert max(float((x.c2w - y.c2w).abs().max()) for x, y in pairs) < 1e-12
    padded = [[(*frame.lens.coefficients, *(0.0,) * 8)[:8] for frame in pair] for pair in pairs]
    return all(x.lens.camera == y.lens.camera for x, y in pairs) and all(x == y for x, y in padded)


def test_a_capture_goes_to_colmap_and_back_with_its_names_and_pixels(tmp_path, source, capsys):
    assert run(source, tmp_path / "model", "--format", "colmap") == 0
    assert "the split is left out" in capsys.readouterr().out
    model = parse_capture(tmp_path / "model")
    assert [frame.name for frame in model.frames] == ["a/9.png", "a/10.png", "b/2.png", "c.png"]
    assert model.source == tmp_path / "model/sparse/0/images.txt"
    assert run(tmp_path / "model", tmp_path / "back") == 0
    back = parse_capture(tmp_path / "back")
    assert [frame.name for frame in back.frames] == ["images/a/9.png", "images/a/10.png", "images/b/2.png", NAMES[3]]
    assert same_cameras(source, tmp_path / "model") and same_cameras(source, tmp_path / "back")


def test_transforms_json_keeps_split_points_and_unit(tmp_path, source):
    assert run(source / "transforms.json", tmp_path / "deep" / "out", "--format", "transforms", "--copy") == 0
    out = parse_capture(tmp_path / "deep" / "out")
    assert out.is_metric and same_cameras(source, tmp_path / "deep" / "out")
    assert out.lists == {"rule": "by hand", "train": [NAMES[2], NAMES[1]], "val": [], "test": [NAMES[3]]}
    assert not any("import" in path.name for path in (tmp_path / "deep").rglob("*"))


def test_images_outside_a_folder_of_images_keep_their_folders(tmp_path, source):
    text = (source / "transforms.json").read_text().replace(NAMES[3], "c.png")
    (source / "transforms.json").write_text(text)
    (source / "split.json").unlink()
    (source / NAMES[3]).rename(source / "c.png")
    assert run(source, tmp_path / "out") == 0
    names = {frame.name for frame in parse_capture(tmp_path / "out").frames}
    assert names == {"images/c.png", *(f"images/{name}" for name in NAMES[:3])}


def test_links_share_the_file_and_fall_back_to_copies(tmp_path, source, monkeypatch):
    assert run(source, tmp_path / "linked", "--link") == 0
    assert (tmp_path / "linked" / NAMES[0]).samefile(source / NAMES[0])
    assert run(source, tmp_path / "copied") == 0
    assert not (tmp_path / "copied" / NAMES[0]).samefile(source / NAMES[0])

    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert run(source, tmp_path / "other_disk", "--link") == 0
    assert same_cameras(source, tmp_path / "other_disk")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on stderr of a call that ends with exit code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("posemap import: error: ") and error.count("\n") == 1
    return error


def test_a_folder_that_holds_something_is_not_touched(tmp_path, source, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    assert "full: exists and is not empty" in refused(capsys, source, tmp_path / "full")
    assert "thesis.txt: exists and is not empty" in refused(capsys, source, tmp_path / "full" / "thesis.txt")
    assert [path.name for path in tmp_path.rglob("*.txt")] == ["thesis.txt"]
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.txt").write_text("x")
    assert "mine.partial: is in the way" in refused(capsys, source, tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    assert run(source, tmp_path / "empty") == 0


def test_an_interrupted_import_leaves_nothing(tmp_path, source, monkeypatch):
    copied = []

    def stop(_: Path, target: Path) -> None:
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(target)

    monkeypatch.setattr(module.shutil, "copyfile", stop)
    assert run(source, tmp_path / "out") == 130
    assert len(copied) == 2 and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_killed_import_can_be_run_again(tmp_path, source, monkeypatch):
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # a killed process does not clean up
        patch.setattr(module.shutil, "copyfile", kill)
        assert run(source, tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    (tmp_path / "out.partial" / "images" / "stale.png").touch()
    assert run(source, tmp_path / "out") == 0
    assert same_cameras(source, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out" / "images" / "stale.png").exists()


def test_a_full_disk_is_one_line(tmp_path, source, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "out"))

    monkeypatch.setattr(module.shutil, "copyfile", full)
    assert "No space left on device; make room" in refused(capsys, source, tmp_path / "out")


def test_options_reach_the_parser_with_their_types(tmp_path, source, capsys):
    assert run(source, tmp_path / "model", "--format", "colmap") == 0
    (tmp_path / "model" / "images").rename(tmp_path / "model" / "photos")
    assert run(tmp_path / "model", tmp_path / "out", "--set", "images=photos", "--dataset", "colmap") == 0
    assert "unknown option 'imags'; did you mean 'images'" in refused(
        capsys, tmp_path / "model", tmp_path / "x", "--set", "imags=photos"
    )
    assert "--set original_frame=maybe: must be true or false; got 'maybe'" in refused(
        capsys, source, tmp_path / "x", "--set", "original_frame=maybe"
    )
    assert "must look like key=value" in refused(capsys, source, tmp_path / "x", "--set", "original_frame")
    assert "unknown dataset format 'colmp'; did you mean 'colmap'" in refused(
        capsys, source, tmp_path / "x", "--dataset", "colmp"
    )
    assert "nothing: no dataset found here" in refused(capsys, tmp_path / "nothing", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_lists_of_frames_that_are_not_there_are_refused(tmp_path, source, capsys):
    for value in (["images/z.png"], "all", 7, [None]):
        (source / "split.json").write_text(json.dumps({"train": value}))
        assert "split.json: train: " in refused(capsys, source, tmp_path / "out")


def test_lenses_that_the_format_cannot_say_are_refused_and_leave_nothing(tmp_path, source, capsys):
    assert run(source, tmp_path / "model", "--format", "colmap") == 0
    cameras = tmp_path / "model" / "sparse" / "0" / "cameras.txt"
    cameras.write_text("".join(f"{i} FOV 40 30 30 30 20 15 0.9\n" for i in range(1, 5)))
    assert "lens model fov: transforms.json has no such model; undistort" in refused(
        capsys, tmp_path / "model", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert run(tmp_path / "model", tmp_path / "model2", "--format", "colmap") == 0


def test_help_shows_examples_and_the_options_of_the_formats(capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "posemap import my_capture my_model --format colmap" in text and "colmap: images;" in text
