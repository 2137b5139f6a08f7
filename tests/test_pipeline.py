"""The whole product on a miniature of the scene `room`: files, resume after kills, refusals, commands."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml

from posemap_fast.cli import main
from posemap_fast.data import load_scene
from posemap_fast.experiment import preset_names
from posemap_fast.localize import PoseRegressor, SceneMap

MINIATURE = [
    *("--preset", "smoke", "--quiet", "--set", "device=cpu"),  # compared bit by bit: a GPU adds in any order
    *("--set", "data.room_train=24", "--set", "data.room_test=6", "--set", "data.room_width=64"),
    *("--set", "nerf.steps=60", "--set", "nerf.samples_per_step=4096", "--set", "posemap.steps=30"),
    *("--set", "apr.steps=24", "--set", "apr.validate_every=8", "--set", "checkpoint_every_s=0.5"),
    *("--set", "network.input_size=[48,64]", "--set", "data.network_side=0", "--set", "threads=1"),
]
FILES = [
    *("scene.map", "localizer.pmnet", "poses_test.txt", "poses_test_gt.txt", "summary.json", "report.html"),
    *("refined.json", "poses_test_refined.txt", "metrics.jsonl", "config.yaml", "log.txt", "checkpoints"),
]


def command(out: Path, *extra: str) -> list[str]:
    return [sys.executable, "-m", "posemap_fast.cli", "train", "--out", str(out), *MINIATURE, *extra]


def metrics(out: Path) -> dict[str, Any]:
    """Everything in summary.json that is not a time."""
    summary = json.loads((out / "summary.json").read_text())
    for section in ("nerf", "posemap", "apr"):
        summary[section].pop("train_s")
    summary["nerf"].pop("rays_per_s")
    summary["refined"].pop("ms_per_image")
    return {key: value for key, value in summary.items() if key not in ("time_s", "environment", "commit")}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an uninterrupted run, made in a process of its own."""
    out = tmp_path_factory.mktemp("whole") / "run"
    begin = time.monotonic()
    subprocess.run(command(out), check=True, capture_output=True)
    (out.parent / "seconds").write_text(str(time.monotonic() - begin))
    return out


def test_run_leaves_every_file_of_the_contract(finished: Path) -> None:
    assert sorted(p.name for p in finished.iterdir()) == sorted(FILES)
    summary = json.loads((finished / "summary.json").read_text())
    for key in ("schema", "scene", "preset", "seed", "protocol", "scene_extent_m", "environment", "commit"):
        assert key in summary
    assert set(summary["baselines"]) == {"mean_pose", "nearest_view", "pose_only"}
    assert summary["apr"]["n_test"] == 6 and set(summary["apr"]["recall"]) >= {"0.05m_5deg"}
    assert summary["time_s"]["total"] > 0
    assert summary["refined"]["n_test"] == 6 and summary["refined"]["uncertainty"]["t"]["coverage"]
    kept = {path.name for path in (finished / "checkpoints").iterdir()}
    assert kept > {"refine_val_0.pt", "refine_val_1.pt", "refine_test.pt"}  # an interrupted judgement goes on
    usual = SceneMap.load(finished / "scene.map").usual_difference
    assert usual is not None and 0 < usual < 1


FEW_STEPS = [
    *("data.room_train=10", "data.room_test=3", "data.room_width=48", "data.network_side=0", "data.max_side=0"),
    *("data.unlabelled_every=3", "field.log2_hashmap_size=12", "render.steps_per_unit=24"),
    *("render.occupancy.resolution=32", "nerf.steps=40", "nerf.samples_per_step=2048", "posemap.steps=2"),
    *("posemap.batch=2", "network.weights=random", "network.input_size=[36,48]", "apr.steps=3", "apr.batch=2"),
    *(
        "apr.rvs_batch=1",
        "align.steps=2",
        "align.batch=2",
        "align.image_pose.steps=2",
        "align.image_pose.rows=8",
        "device=cpu",
        "threads=1",
    ),
]


@pytest.mark.parametrize(
    ("preset", "further"),
    [
        *((name, ()) for name in preset_names() if name != "smoke"),
        ("smoke", ("field.transient_dim=4", "apr.ema=0.9", "network.head=attention", "protocol=transductive")),
    ],
)
def test_every_preset_runs_all_its_stages(preset: str, further: tuple[str, ...], tmp_path: Path) -> None:
    """As it is but for sizes and steps: its losses, network, precision and alignment meet each other."""
    changes = [word for change in (*FEW_STEPS, *further) for word in ("--set", change)]
    assert main(["train", "--out", str(tmp_path / "run"), "--preset", preset, "--quiet", *changes]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["preset"] == preset
    assert all(np.isfinite(summary[key]["median_t_m"]) for key in ("apr", "aligned", "refined"))
    assert PoseRegressor.load(tmp_path / "run" / "localizer.pmnet").errors is not None
    assert SceneMap.load(tmp_path / "run" / "scene.map").name == "room"


def test_refined_answers_can_be_left_to_later_and_few_validation_views_do_not_tell_their_sigma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    changes = [word for change in FEW_STEPS for word in ("--set", change)]
    common = ["train", "--preset", "smoke", "--quiet", *changes, "--out"]
    assert main([*common, str(tmp_path / "later"), "--no-refine"]) == 0
    assert "posemap refine" in capsys.readouterr().out
    summary = json.loads((tmp_path / "later" / "summary.json").read_text())
    assert "refined" not in summary and "refine" not in summary["time_s"]
    assert not {"refined.json", "poses_test_refined.txt"} & {path.name for path in (tmp_path / "later").iterdir()}
    monkeypatch.setattr("posemap_fast.refinement._LEAST_VIEWS", 1000)
    assert main([*common, str(tmp_path / "few")]) == 0
    assert "+ render and compare" in capsys.readouterr().out
    summary = json.loads((tmp_path / "few" / "summary.json").read_text())
    assert summary["refined"]["uncertainty"] == {} and summary["refined"]["n_test"] == summary["apr"]["n_test"]
    assert "too few to tell the errors of refined answers" in summary["left_out"][-1]
    assert not (tmp_path / "few" / "refined.json").exists() and (tmp_path / "few" / "poses_test_refined.txt").exists()


def test_second_call_says_that_it_is_done_and_changes_nothing(finished: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert main(["train", "--out", str(finished), *MINIATURE]) == 0
    assert "already done" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_run_killed_at_random_moments_ends_with_the_same_metrics(finished: Path, tmp_path: Path) -> None:
    whole_s = float((finished.parent / "seconds").read_text())
    moments = random.Random(7)
    n_kills = int(os.environ.get("POSEMAP_TEST_KILLS", "3"))
    for _ in range(n_kills):
        process = subprocess.Popen(
            command(tmp_path / "run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        try:
            process.wait(timeout=moments.uniform(0.25, 0.9) * whole_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    subprocess.run(command(tmp_path / "run"), check=True, capture_output=True)
    assert metrics(tmp_path / "run") == metrics(finished)
    ours, theirs = (
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (d / "metrics.jsonl").open()]
        for d in (tmp_path / "run", finished)
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "1"), "seed is 0 there and 1 now"),
        (("--set", "apr.lr=0.5"), r"config\.apr\.lr is 0\.001 there and 0\.5 now"),
        (("--scene", "SCENE"), "scene is room there"),
    ],
    ids=["seed", "config", "scene"],
)
def test_directory_of_another_run_is_refused(finished: Path, change, message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "capture").mkdir()
    change = [str(tmp_path / "capture") if word == "SCENE" else word for word in change]
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert main(["train", "--out", str(finished), *MINIATURE, *change]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and "choose another --out" in error and error.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in finished.rglob("*")}


def test_directory_with_other_files_is_refused_and_kept(tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["train", "--out", str(tmp_path), *MINIATURE]) == 2
    assert "is not the directory of a run" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "apr.stepz=5"], "did you mean 'steps'"),
        (["--set", "apr.steps=many"], "apr.steps"),
        (["--set", "field.backbone=nativ"], "did you mean 'native'"),
        (["--preset", "cpuu"], "unknown preset"),
        (["--set", "align.method=paper"], "use align.method=distil, or network.pose_from=head"),
        (["--scene", "no/such/folder"], "no such file or folder"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(words: list[str], message: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def write_view(folder: Path) -> Path:
    path = folder / "query.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    return path


def write_photograph(folder: Path) -> Path:
    """Of the scene `room`."""
    scene = load_scene("room", None, n_train=60, n_test=4, width=64, height=48)
    path = folder / "photograph.png"
    cv2.imwrite(str(path), scene.images[torch.tensor([0])][0].numpy()[..., ::-1])
    return path


def test_localize_prints_one_json_line_per_image(finished: Path, tmp_path: Path, capsys) -> None:
    image = write_view(tmp_path)
    assert main(["localize", str(finished), str(image), str(image)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2
    assert set(lines[0]) == {"name", "c2w", "t", "q", "sigma_t_m", "sigma_r_deg", "ms"}
    rotation = torch.tensor(lines[0]["c2w"])[:3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), atol=1e-4, rtol=0)
    assert lines[0]["c2w"] == lines[1]["c2w"] and lines[0]["sigma_t_m"] > 0


REFINE = ("--steps", "3", "--rows", "24", "--quiet")


@pytest.fixture
def movable(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be written to."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_refined_answers_are_judged_and_then_carry_their_own_sigma(movable: Path, tmp_path: Path, capsys) -> None:
    image = str(write_photograph(tmp_path))
    assert main(["localize", str(movable), image]) == 0
    plain = json.loads(capsys.readouterr().out)
    config = yaml.safe_load((movable / "config.yaml").read_text())
    config["config"]["align"]["image_pose"] |= {"blur_px": [2.0, 0.5], "step_t": 0.01}  # as earlier versions had
    (movable / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["refine", str(movable), *REFINE]) == 0
    assert "90th percentile of the surest half" in capsys.readouterr().out
    stored = json.loads((movable / "refined.json").read_text())
    assert (stored["config"]["steps"], stored["config"]["rows"], stored["n_val"]) == (3, 24, 16)
    summary = json.loads((movable / "summary.json").read_text())
    assert stored["test"]["network"]["median_t_m"] == pytest.approx(summary["aligned"]["median_t_m"], rel=1e-3)
    assert stored["test"]["refined"]["n_test"] == 6
    assert set(stored["test"]["uncertainty"]["t"]["coverage"]) == {"0.5", "0.68", "0.9"}
    assert main(["localize", str(movable), image, image, "--refine"]) == 0
    out = capsys.readouterr()
    answers = [json.loads(line) for line in out.out.splitlines()]
    assert out.err == "" and answers[0]["c2w"] == answers[1]["c2w"] != plain["c2w"]
    assert answers[0]["sigma_t_m"] > 0 and answers[0]["sigma_r_deg"] > 0 and set(answers[0]) == set(plain)
    moved = torch.tensor(answers[0]["t"]) - torch.tensor(plain["t"])
    assert 0 < float(moved.norm()) < 1


def test_refined_answers_that_nobody_judged_have_no_sigma(movable: Path, tmp_path: Path, capsys) -> None:
    (movable / "refined.json").unlink()
    assert main(["localize", str(movable), str(write_view(tmp_path)), "--refine"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["sigma_t_m"] is None and "'posemap refine" in out.err


def test_training_judges_refined_answers_as_the_command_does(movable: Path) -> None:
    trained = json.loads((movable / "refined.json").read_text())
    assert main(["refine", str(movable), "--quiet"]) == 0
    judged = json.loads((movable / "refined.json").read_text())
    for stored in (trained, judged):
        stored["test"].pop("ms_per_image")
    assert judged == trained
    summary = json.loads((movable / "summary.json").read_text())
    assert {key: summary["refined"][key] for key in trained["test"]["refined"]} == trained["test"]["refined"]


def test_refining_needs_a_finished_run_its_scene_and_its_map(movable: Path, tmp_path: Path, capsys) -> None:
    def failure(*words: object) -> str:
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    image = write_view(tmp_path)
    assert "needs the map beside" in failure("localize", movable / "localizer.pmnet", image, "--refine")
    assert "rows >= 8" in failure("refine", movable, "--rows", "2")
    assert "no config.yaml" in failure("refine", tmp_path)
    good = {"version": 2, "config": {}}
    (movable / "refined.json").write_text('{"version": 7}')
    assert "of version 7" in failure("localize", movable, image, "--refine")
    for text in ("[]", '{"version": 2}', "{", json.dumps(good | {"calibration": {"t": [], "r": []}})):
        (movable / "refined.json").write_text(text)
        assert "not what 'posemap refine' writes" in failure("localize", movable, image, "--refine")
    config = (movable / "config.yaml").read_text()
    (movable / "config.yaml").write_text(config.replace("fingerprint: ", "fingerprint: 0"))
    assert "has changed since this run" in failure("refine", movable, *REFINE)
    (movable / "config.yaml").write_text("scene: room\npreset: cpu\nseed: 0\nconfig: 3\n")
    assert "not the config of a run; the run is of no use" in failure("refine", movable, *REFINE)
    (movable / "config.yaml").write_text(config)
    (movable / "summary.json").unlink()
    assert "not finished" in failure("refine", movable, *REFINE)


def test_localizer_file_alone_is_enough(finished: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere.pmnet"
    moved.write_bytes((finished / "localizer.pmnet").read_bytes())
    here, there = PoseRegressor.load(finished / "localizer.pmnet"), PoseRegressor.load(moved)
    image = torch.zeros(48, 64, 3, dtype=torch.uint8)
    assert torch.equal(here.localize(image).c2w, there.localize(image).c2w)


def test_map_renders_the_same_on_another_backbone(finished: Path) -> None:
    maps = [SceneMap.load(finished / "scene.map", name) for name in ("native", "reference")]
    rays_o, rays_d = torch.zeros(5, 3) + torch.tensor([0.0, 0.0, 1.4]), torch.eye(3)[[0, 1, 0, 1, 2]]
    outs = [m.renderer.render_rays(m.nerfp, rays_o, rays_d, want_posemap=True) for m in maps]
    torch.testing.assert_close(outs[0].posemap, outs[1].posemap, rtol=1e-3, atol=1e-3)


def test_evaluate_reproduces_the_summary_from_the_trajectories(finished: Path, tmp_path: Path) -> None:
    assert main(["evaluate", str(finished), "--json", str(tmp_path / "e.json")]) == 0
    ours = json.loads((tmp_path / "e.json").read_text())
    summary = json.loads((finished / "summary.json").read_text())
    files = ("--pred", finished / "poses_test_refined.txt", "--gt", finished / "poses_test_gt.txt")
    assert main(["evaluate", *map(str, files), "--json", str(tmp_path / "refined.json")]) == 0
    refined = json.loads((tmp_path / "refined.json").read_text())
    for key in ("median_t_m", "median_r_deg", "mean_t_m"):
        assert ours[key] == pytest.approx(summary["aligned"][key], rel=1e-4)
        assert refined[key] == pytest.approx(summary["refined"][key], rel=1e-4)
    assert ours["refined"] == refined


def test_evaluate_tells_recall_in_metres_where_there_are_metres(finished: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "recall 0.05m_5deg" in shown and "median_t_m" in shown and "refined" in shown
    summary = tmp_path / "run" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"unit": "scene units (not metric)"}))
    (tmp_path / "run" / "poses_test_refined.txt").unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "_5deg" not in shown and "median_t (units)" in shown and "refined" not in shown
    summary.unlink()
    assert main(["evaluate", str(tmp_path / "run")]) == 2 and "no summary.json" in capsys.readouterr().err


def test_inspect_names_what_it_finds(finished: Path, capsys) -> None:
    for name, kind in (("scene.map", "scene map"), ("localizer.pmnet", "localizer"), ("", "run")):
        assert main(["inspect", str(finished / name)]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == kind


def test_render_writes_pictures(finished: Path, tmp_path: Path) -> None:
    words = ["--poses", str(finished / "poses_test_gt.txt"), "--out", str(tmp_path), "--limit", "2", "--depth"]
    assert main(["render", str(finished), *words]) == 0
    pictures = sorted(tmp_path.glob("*.png"))
    assert len(pictures) == 4 and cv2.imread(str(pictures[0])).shape == (48, 64, 3)


def test_report_is_one_page_with_pictures_and_no_address(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/") >= 6
    assert not re.search(r"(src|href)=[\"']https?:", page)


@pytest.mark.parametrize("damage", ["truncated", "magic", "byte"])
@pytest.mark.parametrize("name", ["scene.map", "localizer.pmnet"])
def test_damaged_file_is_named_and_exit_is_2(finished: Path, name: str, damage: str, tmp_path: Path, capsys) -> None:
    data = bytearray((finished / name).read_bytes())
    if damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "magic":
        data[:8] = b"NOTAMAP!"
    else:
        data[len(data) // 3] ^= 1
    broken = tmp_path / name
    broken.write_bytes(data)
    poses = str(finished / "poses_test_gt.txt")
    words = {
        "scene.map": ["render", str(broken), "--poses", poses, "--out", str(tmp_path / "pictures")],
        "localizer.pmnet": ["localize", str(broken), str(write_view(tmp_path))],
    }
    assert main(words[name]) == 2
    error = capsys.readouterr().err
    assert name in error and error.count("\n") == 1
