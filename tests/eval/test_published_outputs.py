"""The medians of published predictions, recomputed: an evaluator that does not give these is wrong.

Needs a folder with `poses/published_outputs_DFNet/{7Scenes,Cambridge}/<scene>_{predict,Nefes_50,test_gt}.txt.gz`:
per-frame poses of DFNet (Chen et al., ECCV 2022), and of the same after 50 steps of NeFeS (Chen et al., CVPR 2024).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posemap_fast.cli import main
from posemap_fast.eval import evaluate_files

pytestmark = pytest.mark.dataset

# scene -> n, (m, deg) of DFNet to the last digit as published with the files, (m, deg) of NeFeS computed from them
SCENES = {
    "Cambridge/KingsCollege": (343, ("0.732", "2.37"), ("0.366", "0.54")),
    "Cambridge/OldHospital": (182, ("1.995", "2.98"), ("0.522", "0.88")),
    "Cambridge/ShopFacade": (103, ("0.674", "2.20"), ("0.149", "0.53")),
    "Cambridge/StMarysChurch": (530, ("1.371", "4.03"), ("0.372", "1.14")),
    "7Scenes/chess": (2000, ("0.033", "1.12"), ("0.017", "0.56")),
    "7Scenes/fire": (2000, ("0.058", "2.30"), ("0.020", "0.74")),
    "7Scenes/heads": (1000, ("0.042", "2.24"), ("0.020", "1.28")),
    "7Scenes/office": (4000, ("0.059", "1.54"), ("0.019", "0.56")),
    "7Scenes/pumpkin": (2000, ("0.067", "1.88"), ("0.020", "0.55")),
    "7Scenes/redkitchen": (5000, ("0.066", "1.72"), ("0.020", "0.57")),
    "7Scenes/stairs": (1000, ("0.120", "2.63"), ("0.046", "1.28")),
}
METHODS = ("predict", "Nefes_50")


@pytest.fixture
def published(real_scenes: Path) -> Path:
    return real_scenes / "poses" / "published_outputs_DFNet"


@pytest.mark.parametrize("scene", SCENES)
def test_the_published_medians_come_out_to_the_last_digit(published: Path, tmp_path: Path, scene: str) -> None:
    pred, gt, out = published / f"{scene}_predict.txt.gz", published / f"{scene}_test_gt.txt.gz", tmp_path / "e.json"
    assert main(["evaluate", "--pred", str(pred), "--gt", str(gt), "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (f"{found['median_t_m']:.3f}", f"{found['median_r_deg']:.2f}") == SCENES[scene][1]
    assert found["n_test"] == SCENES[scene][0] and found["n_missing"] == found["n_unmatched"] == 0
    assert found == evaluate_files(pred, gt)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", ["Cambridge", "7Scenes"])
def test_folders_give_the_table_of_a_benchmark(
    published: Path, tmp_path: Path, capsys, monkeypatch, benchmark: str, method: str
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    scenes = {key: values for key, values in SCENES.items() if key.startswith(benchmark)}
    for folder, kind in (("pred", method), ("gt", "test_gt")):
        (tmp_path / folder).mkdir()
        for scene in scenes:
            (tmp_path / folder / f"{Path(scene).name}.txt.gz").symlink_to(published / f"{scene}_{kind}.txt.gz")
    words = ["--pred", str(tmp_path / "pred"), "--gt", str(tmp_path / "gt"), "--json", str(tmp_path / "table.json")]
    assert main(["evaluate", *words]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    medians = {row["scene"]: (f"{row['median_t_m']:.3f}", f"{row['median_r_deg']:.2f}") for row in rows}
    assert medians == {Path(scene).name: values[1 + METHODS.index(method)] for scene, values in scenes.items()}
    lines = capsys.readouterr().out.splitlines()
    for name, (metres, degrees) in medians.items():
        line = next(line for line in lines if name in line)
        assert metres in line and degrees in line
