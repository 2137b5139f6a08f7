"""`posemap evaluate` on folders: one row per scene, and one line for each thing that does not fit together."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from posemap_fast.cli import main
from posemap_fast.errors import DatasetError
from posemap_fast.eval.trajectory import evaluate_folders

TRUTH = "a.png 0 0 0 1 0 0 0\nb.png 1 0 0 1 0 0 0\nc.png 2 0 0 1 0 0 0\n"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Predictions and truths of two scenes; the second prediction lacks a view and is zipped."""
    pred, gt = tmp_path / "pred", tmp_path / "gt"
    for folder in (pred, gt):
        folder.mkdir()
    for name in ("fire", "chess"):
        (gt / f"{name}.txt").write_text(TRUTH)
    (pred / "chess.txt").write_text(TRUTH.replace("1 0 0 1", "1.3 0.4 0 1"))
    (pred / "fire.txt.gz").write_bytes(gzip.compress(TRUTH.splitlines()[0].encode()))
    return pred, gt


def test_one_row_per_scene_in_the_order_of_the_names(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = tmp_path / "table.json"
    assert main(["evaluate", "--pred", str(folders[0]), "--gt", str(folders[1]), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [row["scene"] for row in rows] == ["chess", "fire"]
    assert [row["n_test"] for row in rows] == [3, 3] and [row["n_missing"] for row in rows] == [0, 2]
    assert rows[0]["mean_t_m"] == pytest.approx(0.5 / 3) and rows[0]["recall"]["0.5m_5deg"] == 1
    assert rows[1]["recall"]["5m_10deg"] == pytest.approx(1 / 3)
    table = capsys.readouterr().out
    chess, fire = (next(line for line in table.splitlines() if name in line) for name in ("chess", "fire"))
    assert "0.000" in chess and "66.7" in chess and "inf" in fire and "33.3" in fire


def test_a_truth_without_prediction_is_refused_and_the_other_way_only_warned_of(folders, caplog):
    pred, gt = folders
    (pred / "heads.txt").write_text(TRUTH)
    assert len(evaluate_folders(pred, gt)) == 2 and "heads.txt: is left out" in caplog.text
    (gt / "Heads.txt").write_text(TRUTH)
    with pytest.raises(DatasetError, match=r"pred: has no 'Heads.txt' for .*; rename 'heads.txt'"):
        evaluate_folders(pred, gt)


def test_folders_that_are_empty_or_ambiguous_are_refused(folders, tmp_path):
    pred, gt = folders
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no file"):
        evaluate_folders(pred, tmp_path / "empty")
    with pytest.raises(DatasetError, match="cannot list this folder"):
        evaluate_folders(pred, tmp_path / "nowhere")
    (pred / "fire.txt").write_text(TRUTH)
    with pytest.raises(DatasetError, match="a second time"):
        evaluate_folders(pred, gt)


def test_a_folder_against_a_file_is_one_line(folders, capsys):
    assert main(["evaluate", "--pred", str(folders[0]), "--gt", str(folders[1] / "fire.txt")]) == 2
    assert "cannot read this pose file" in capsys.readouterr().err
