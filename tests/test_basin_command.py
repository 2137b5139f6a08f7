"""`posemap basin` on a tiny map: which poses it walks from, what it writes, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.cli import main
from posemap_fast.commands import basin as command
from posemap_fast.eval import pose_errors, write_tum
from posemap_fast.eval.basin import BASIN_STARTS, displaced, measure_basin
from posemap_fast.fields import FieldConfig
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.localize import SceneMap
from posemap_fast.render import OccupancyConfig, RenderConfig

pytestmark = pytest.mark.usefixtures("one_thread")
FIELD = FieldConfig(n_levels=4, log2_hashmap_size=10, base_resolution=4, finest_resolution=16, hidden=16)
STEPS = ["--steps", "3", "--starts", "0.05,2", "0.2,10"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Directory with an untrained map and nine test poses."""
    torch.manual_seed(0)
    render = RenderConfig(steps_per_unit=32, occupancy=OccupancyConfig(resolution=16))
    frame = SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))
    camera = Camera(64, 48, 16.0, 16.0, 32.0, 24.0)
    found = SceneMap.untrained("tiny", FIELD, render, frame, 0.02, PoseFrame(), camera)
    folder = tmp_path / "run"
    folder.mkdir()
    found.save(folder / "scene.map")
    truth = displaced(torch.eye(4).double().repeat(9, 1, 1), 0.3, 20.0, torch.Generator().manual_seed(1))
    write_tum(folder / "poses_test_gt.txt", truth)
    return folder


def failure(capsys, *words: object) -> str:
    """The one line that a refused call prints."""
    assert main(["basin", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_report_picture_and_table(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out, picture = tmp_path / "basin.json", tmp_path / "basin.png"
    assert main(["basin", str(run), *STEPS, "--json", str(out), "--picture", str(picture)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["start_t"], row["start_r_deg"], row["n"], row["loss"]) for row in rows] == [
        (0.05, 2.0, 9, "l2"),
        (0.2, 10.0, 9, "l2"),
    ]
    assert all(0 <= row["share_home"] <= 1 and row["median_t"] > 0 and row["median_r_deg"] > 0 for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert "tiny: walks down the PoseMap loss (l2) from 9 poses" in table
    for row in rows:
        line = next(line for line in table.splitlines() if f" {row['start_t']:g} " in line)
        assert f"{100 * row['share_home']:.1f} %" in line and f"{row['median_t']:.4f}" in line


def test_figures_are_those_of_the_stored_map_and_repeat(run: Path, tmp_path: Path) -> None:
    reports = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(["basin", str(run), *STEPS, "--json", str(tmp_path / name), "--seed", str(seed)])
        reports.append(json.loads((tmp_path / name).read_text()))
    assert reports[0] == reports[1] != reports[2]


@pytest.mark.parametrize(("n_used", "expected"), [(1, [0]), (3, [0, 4, 8]), (9, list(range(9))), (50, list(range(9)))])
def test_poses_are_spread_evenly_over_the_file(run: Path, monkeypatch, n_used: int, expected: list[int]) -> None:
    seen: list[torch.Tensor] = []

    def watched(renderer, nerfp, camera, c2w, starts, meter, **options):
        seen.append(c2w)
        assert starts == list(BASIN_STARTS) and options == {"n_steps": 1, "loss": "cosine", "seed": 7}
        return measure_basin(renderer, nerfp, camera, c2w, starts[:1], meter, **options)

    monkeypatch.setattr(command, "measure_basin", watched)
    words = ["--poses-used", str(n_used), "--steps", "1", "--loss", "cosine", "--seed", "7"]
    assert main(["basin", str(run), *words]) == 0
    truth = displaced(torch.eye(4).double().repeat(9, 1, 1), 0.3, 20.0, torch.Generator().manual_seed(1))[expected]
    t, r = pose_errors(seen[0], truth)
    assert seen[0].dtype == torch.float32 and float(t.max()) < 1e-5 and float(r.max()) < 1e-2


def test_a_map_alone_needs_poses_and_takes_them(run: Path, tmp_path: Path, capsys) -> None:
    moved = tmp_path / "elsewhere.map"
    (run / "scene.map").rename(moved)
    assert "give --poses FILE" in failure(capsys, moved)
    words = ["--poses", str(run / "poses_test_gt.txt"), "--poses-used", "2", *STEPS]
    assert main(["basin", str(moved), *words]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--starts", "0.1"], "--starts 0.1: give distance and angle as T,DEG"),
        (["--starts", "0.1,5,3"], "--starts 0.1,5,3: give distance"),
        (["--starts", "near,5"], "--starts near,5: give distance"),
        (["--starts", "0.1,5", "0,5"], "distances and angles must be > 0"),
        (["--poses-used", "0"], "must be >= 1"),
        (["--steps", "0"], "must be >= 1"),
        (["--poses", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_options_are_one_line(run: Path, capsys, words: list[str], message: str) -> None:
    assert message in failure(capsys, run, *words)


def test_a_file_without_poses_is_refused(run: Path, capsys) -> None:
    (run / "poses_test_gt.txt").write_text("# none\n")
    failure(capsys, run)


def test_a_damaged_map_is_named(run: Path, capsys) -> None:
    (run / "scene.map").write_bytes((run / "scene.map").read_bytes()[:-5])
    assert "scene.map" in failure(capsys, run)


def test_a_run_without_test_poses_is_named(run: Path, capsys) -> None:
    (run / "poses_test_gt.txt").unlink()
    assert "poses_test_gt.txt" in failure(capsys, run)
