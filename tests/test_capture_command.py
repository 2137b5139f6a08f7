"""`posemap capture`: its errors, its stages, the conventions of what it writes, and a real scene from end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.cli import main
from posemap_fast.commands import capture as capture_module
from posemap_fast.commands.capture import Stages
from posemap_fast.data import load_scene, parse_capture, write_transforms_json
from posemap_fast.data.structure_from_motion import (
    KnownDistance,
    SfmConfig,
    StructureFromMotion,
    pairs_of,
    up_to_z,
)
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import invert_c2w, look_at, rotation_angle_deg, so3_exp
from posemap_fast.optional import PYCOLMAP, OptionalLibrary
from posemap_fast.progress import NoProgress

needs_pycolmap = pytest.mark.skipif(
    PYCOLMAP.version() is None, reason="pycolmap is not installed: pip install pycolmap"
)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four photos of nothing that could be matched."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(4):
        noise = np.random.default_rng(seed).integers(0, 255, (96, 128, 3), np.uint8)
        cv2.imwrite(str(folder / f"{seed}.png"), cv2.GaussianBlur(noise, (0, 0), 2.0))
    return folder


def run(*arguments: object) -> int:
    return main(["capture", *map(str, arguments), "--quiet", "--threads", "1"])


def test_without_pycolmap_the_command_says_how_to_install_it(monkeypatch, capsys, photos, tmp_path):
    monkeypatch.setattr(OptionalLibrary, "version", lambda self: None)
    assert run(photos, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "pycolmap is not installed; install it with: pip install pycolmap" in message and "CUDA" not in message
    assert not (tmp_path / "out").exists()


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main(["capture", "--help"])
    text = capsys.readouterr().out
    assert "posemap capture room.mp4 scenes/room" in text and "posemap train --scene" in text
    for option in ("--max-frames", "--max-side", "--matching", "--known-distance"):
        assert option in text


@needs_pycolmap
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.mp4", "out"], "nothing.mp4: no such file or folder"),
        (["{photos}", "out", "--max-side", "10"], "--max-side: must be at least 64 pixels; got 10"),
        (["{photos}", "out", "--max-frames", "2"], "got 2 and 2"),
        (["{photos}", "out", "--known-distance", "a", "b", "-1"], "distance in metres above 0; got '-1'"),
        (["{photos}", "out", "--known-distance", "a", "b", "nan"], "distance in metres above 0; got 'nan'"),
        (["{photos}", "{photos}"], "exists and is not made by this command; choose another OUT"),
    ],
)
def test_bad_arguments_are_one_line_and_leave_nothing(capsys, monkeypatch, photos, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(*(text.format(photos=photos) for text in arguments)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and error.count("\n") == 0
    assert sorted(tmp_path.rglob("*")) == before


@needs_pycolmap
def test_images_that_do_not_fit_together_are_an_error_and_other_input_is_refused(capsys, photos, tmp_path):
    out = tmp_path / "out"
    assert run(photos, out) == 2
    assert "the images do not fit together to a model; film slowly" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "images").iterdir()) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / "3.png").rename(other / "5.png")
    assert run(other, out) == 2
    assert f"{out}: holds the scene of {photos}; choose another OUT for {other}" in capsys.readouterr().err


def test_a_stage_is_done_once_and_again_only_for_other_options_or_input(tmp_path):
    done: list[tuple[str, bool]] = []

    def go(fingerprint: str = "f", b_option: int = 1, stop_at: str = "") -> list[tuple[str, bool]]:
        done.clear()
        stages = Stages(tmp_path / "out", "video.mp4", fingerprint, NoProgress())
        for name, option in (("a", 0), ("b", b_option), ("c", 0)):

            def work(is_resumed: bool, name: str = name) -> dict[str, str]:
                done.append((name, is_resumed))
                (tmp_path / "out" / name).touch()
                if name == stop_at:
                    raise KeyboardInterrupt
                return {"name": name}

            assert stages.run(name, (option,), tmp_path / "out" / name, work) == {"name": name}
        return list(done)

    with pytest.raises(KeyboardInterrupt):
        go(stop_at="b")
    assert go() == [("b", True), ("c", False)]
    assert go() == []
    assert go(b_option=2) == [("b", False), ("c", False)]  # what comes after is done again, too
    assert go(b_option=2) == []
    (tmp_path / "out" / "b").unlink()
    assert go(b_option=2) == [("b", False), ("c", False)]
    with pytest.raises(ConfigError, match=r"out: holds the scene of video\.mp4; choose another OUT"):
        go(fingerprint="g")


@pytest.mark.parametrize("content", ["", "{}", "[]", "{", '{"input": 1, "fingerprint": 2, "stages": []}', "\xff"])
def test_damaged_marks_are_refused(tmp_path, content):
    (tmp_path / "capture.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"capture\.json: is damaged; choose another OUT, or remove"):
        Stages(tmp_path, "video.mp4", "f", NoProgress())


def test_exhaustive_pairs_are_all_and_sequential_ones_neighbours_and_loops():
    def flat(blocks):
        return [pair for block in blocks for pair in block]

    assert sorted(flat(pairs_of(50, "auto"))) == [(i, j) for i in range(50) for j in range(i + 1, 50)]
    sequential = set(flat(pairs_of(400, "auto")))
    assert sequential == set(flat(pairs_of(400, "sequential"))) and len(sequential) < 400 * 25
    assert all((i, j) in sequential for i in range(400) for j in range(i + 1, min(i + 11, 400)))
    assert (0, 399) in sequential and max(len(block) for block in pairs_of(400, "auto")) <= 400


def test_up_to_z_turns_the_mean_up_of_the_cameras_and_nothing_more():
    tilt = so3_exp(torch.tensor([0.3, -1.1, 0.4], dtype=torch.float64))
    angles = torch.linspace(0, 6, 9, dtype=torch.float64)
    centres = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=-1) @ tilt.T
    up = tilt @ torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    c2w = look_at(centres, torch.zeros(3, dtype=torch.float64), up)
    turn = up_to_z(c2w)
    assert torch.allclose(turn @ up, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64), atol=1e-9)
    ups = -(turn @ c2w[:, :3, :3])[:, :, 1]
    assert (ups[:, 2] > 0.99).all()
    smallest = torch.rad2deg(torch.arccos(up[2]))
    assert rotation_angle_deg(turn, torch.eye(3, dtype=torch.float64)) == pytest.approx(float(smallest))


@pytest.mark.parametrize(("turn", "want"), [((-np.pi / 2, 0, 0), 0.0), ((np.pi / 2, 0, 0), 180.0)])
def test_up_to_z_of_worlds_that_are_upright_or_upside_down(turn, want):
    c2w = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    c2w[:, :3, :3] = so3_exp(torch.tensor(turn, dtype=torch.float64))
    turned = up_to_z(c2w)
    assert float(rotation_angle_deg(turned, torch.eye(3, dtype=torch.float64))) == pytest.approx(want, abs=1e-6)
    assert (-(turned @ c2w[:, :3, :3])[:, :, 1])[0].tolist() == pytest.approx([0, 0, 1], abs=1e-9)


def test_up_to_z_leaves_cameras_that_do_not_agree():
    c2w = torch.eye(4, dtype=torch.float64)[None].repeat(2, 1, 1)
    c2w[1, :2, :2] *= -1  # one upside down
    assert torch.equal(up_to_z(c2w), torch.eye(3, dtype=torch.float64))


def synthetic(tmp_path: Path, n_models: int = 1):
    """A model as COLMAP writes it, of cameras with a SIMPLE_RADIAL lens, and the reconstruction that reads it."""
    pycolmap = PYCOLMAP.load()
    pycolmap.set_random_seed(3)
    for index, n_frames in enumerate([6, 4][:n_models]):
        options = pycolmap.SyntheticDatasetOptions()
        options.num_rigs, options.num_cameras_per_rig, options.num_frames_per_rig = 1, 1, n_frames
        options.num_points3D, options.camera_model_id = 40, pycolmap.CameraModelId.SIMPLE_RADIAL
        options.camera_params = [500.0, 320.0, 240.0, 0.05]
        options.camera_width, options.camera_height = 640, 480
        model = pycolmap.synthesize_dataset(options)
        folder = tmp_path / "work" / "models" / str(index)
        folder.mkdir(parents=True)
        model.write(folder)
    largest = pycolmap.Reconstruction(tmp_path / "work" / "models" / "0")
    names = [largest.image(i).name for i in largest.reg_image_ids()]
    config = SfmConfig(n_threads=1)
    return largest, StructureFromMotion(tmp_path / "images", [*names, "lost.jpg"], tmp_path / "work", config)


@needs_pycolmap
def test_convention_poses_lens_and_points_reproject_to_what_colmap_saw(tmp_path):
    model, sfm = synthetic(tmp_path, n_models=2)
    found = sfm.result(tmp_path / "sparse" / "0", KnownDistance(*sorted(model.image(i).name for i in (1, 2)), 2.5))
    assert found.unregistered == ["lost.jpg"] and found.n_models == 2 and found.capture.is_metric
    for folder in (tmp_path / "images" / name for name in {Path(f.name).parent for f in found.capture.frames}):
        folder.mkdir(parents=True)
    for frame in found.capture.frames:
        frame.path.write_bytes(b"no matter")
    write_transforms_json(tmp_path, found.capture, {f.name: f"images/{f.name}" for f in found.capture.frames})
    read = {frame.name.removeprefix("images/"): frame for frame in parse_capture(tmp_path).frames}
    written = PYCOLMAP.load().Reconstruction(tmp_path / "sparse" / "0")  # in the turned and scaled world
    points = torch.from_numpy(np.stack([written.point3D(i).xyz for i in sorted(written.point3D_ids())]))
    assert found.capture.points is not None and torch.allclose(found.capture.points.double(), points, atol=1e-4)
    n_seen = 0
    for image in (written.image(i) for i in written.reg_image_ids()):
        frame = read[image.name]
        seen = [p for p in image.points2D if p.has_point3D()]
        xyz = torch.from_numpy(np.stack([written.point3D(p.point3D_id).xyz for p in seen]))
        camera = (invert_c2w(frame.c2w) @ torch.cat([xyz, torch.ones(len(seen), 1)], dim=1).T.double())[:3].T
        pixels = frame.lens.pixels((camera[:, :2] / camera[:, 2:]).numpy())
        assert (camera[:, 2] > 0).all() and np.abs(pixels - np.stack([p.xy for p in seen])).max() < 1e-3
        n_seen += len(seen)
    assert n_seen > 50
    first, second = (read[name].c2w[:3, 3] for name in sorted(model.image(i).name for i in (1, 2)))
    assert float((first - second).norm()) == pytest.approx(2.5)
    up = -torch.stack([frame.c2w[:3, 1] for frame in read.values()]).mean(0)
    assert up.norm() < 0.3 or torch.allclose(up / up.norm(), torch.tensor([0.0, 0.0, 1.0]).double(), atol=1e-9)


@needs_pycolmap
def test_a_known_distance_needs_two_images_with_poses_at_two_places(tmp_path):
    model, sfm = synthetic(tmp_path)
    name = model.image(1).name
    with pytest.raises(DatasetError, match=r"known distance: lost\.jpg is no image with a pose"):
        sfm.result(tmp_path / "sparse", KnownDistance(name, "lost.jpg", 1.0))
    with pytest.raises(DatasetError, match="were taken at one place; choose others"):
        sfm.result(tmp_path / "sparse", KnownDistance(name, name, 1.0))


@pytest.mark.parametrize("values", [{"lens": "radail"}, {"matching": "all"}, {"n_threads": 0}, {"max_features": 5}])
def test_impossible_settings_are_refused(values):
    with pytest.raises(ConfigError, match=f"{next(iter(values))}.*got"):
        SfmConfig(**values)


def similarity_errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Median centre error as a share of the diagonal of the cameras' box, and median rotation error in degrees."""
    a, b = (c2w[:, :3, 3] - c2w[:, :3, 3].mean(0) for c2w in (found, truth))
    u, s, vt = torch.linalg.svd(b.T @ a)  # Umeyama 1991
    sign = torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ vt).sign())], dtype=torch.float64))
    rotation, scale = u @ sign @ vt, (s * sign.diag()).sum() / (a * a).sum()
    extent = (truth[:, :3, 3].amax(0) - truth[:, :3, 3].amin(0)).norm()
    error = (scale * a @ rotation.T - b).norm(dim=1).median() / extent
    return float(error), float(rotation_angle_deg(rotation @ found[:, :3, :3], truth[:, :3, :3]).median())


class StopsInMatching(NoProgress):
    """Ctrl-C when 100 pairs are matched."""

    def task(self, name, total, start=0):
        return _Stop() if name == "matches" else super().task(name, total, start)


class _Stop:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def update(self, step, **values):
        if step >= 100:
            raise KeyboardInterrupt


@needs_pycolmap
@pytest.mark.slow
@pytest.mark.dataset
def test_a_video_of_a_real_scene_becomes_a_scene_even_when_it_is_interrupted(
    real_scenes, tmp_path, monkeypatch, capsys
):
    reference = parse_capture(real_scenes / "fox").frames
    frames = [cv2.imread(str(frame.path)) for frame in reference for _ in range(3)]
    video, out = tmp_path / "fox.avi", tmp_path / "out"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"MJPG"), 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    with monkeypatch.context() as patch:
        patch.setattr(capture_module, "make_progress", lambda quiet: StopsInMatching())
        assert run(video, out) == 130
    assert not (out / "transforms.json").exists()
    assert run(video, out) == 0
    printed = capsys.readouterr().out
    assert "images registered: " in printed and f"next: posemap train --scene {out}" in printed
    result = json.loads((out / "capture.json").read_text())["stages"]["scene"]["result"]
    assert result["n_registered"] >= 45 and result["reprojection_error_px"] < 1.0 and result["n_points"] > 2000
    found = parse_capture(out).frames
    truth = torch.stack([reference[int(frame.name[-10:-4]) // 3].c2w for frame in found])
    centre, rotation = similarity_errors(torch.stack([frame.c2w for frame in found]), truth)
    assert centre < 0.005 and rotation < 1.0  # the principal point of the reference is off the centre by 0.6 deg
    assert load_scene(out).n_views == result["n_registered"]
    first, second = found[0].name.removeprefix("images/"), found[20].name.removeprefix("images/")
    assert run(video, out, "--known-distance", first, second, 2.0) == 0  # redoes the last stage only
    metric = parse_capture(out)
    assert metric.is_metric
    assert float((metric.frames[0].c2w[:3, 3] - metric.frames[20].c2w[:3, 3]).norm()) == pytest.approx(2.0)
