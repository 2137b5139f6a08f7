"""Files of ablations: what they may say, and how mistakes in them are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from posemap_fast.ablation import Ablation, AblationRow, load_ablation
from posemap_fast.cli import main
from posemap_fast.errors import ConfigError
from posemap_fast.resources import resource_dir


def failure(capsys, *words: str) -> str:
    """The one line that a refused call prints."""
    assert main(["ablate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: x", "a.yaml: ablation: rows must name at least one row"),
        ("rows: {a: {sett: []}}", "a.yaml: rows.a: unknown key 'sett'; did you mean 'set'"),
        ("rows: {a: {align: yes}}", "a.yaml: rows.a.align: must be one of"),
        ("rows: {a: }", "a.yaml: rows.a: must be a section"),
        ("rows: [a, b]", "a.yaml: rows: must be a section of `name: ...`"),
        ("rows: {a: {}}\nreference: b", "a.yaml: ablation: reference 'b' is no row (rows: a)"),
        ("rows: {a: {}}\noutliers: -1", "a.yaml: ablation: outliers must be a share below 1 or a whole number"),
        ("rows: {a: {}}\noutliers: 2.5", "whole number of views; got 2.5"),
        ("rows: {a: {}, b: {set: [apr.ema=2]}}", "a.yaml: row 'b': --set apr.ema=2: apr: ema must be in [0, 1)"),
        ("rows: {a: {}}\nset: [apr.x=0]", "a.yaml: row 'a': --set apr.x=0: apr: unknown key 'x'"),
        ("rows: {a: {}}\npreset: fast", "a.yaml: row 'a': --preset fast: unknown preset"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_row(tmp_path: Path, capsys, text: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    assert message in failure(capsys, str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_no_file_lists_those_that_come_with_the_package(capsys) -> None:
    error = failure(capsys, "lossess")
    assert "lossess: no such file" in error and "losses" in error.split("known: ")[1]


@pytest.mark.parametrize("path", sorted((resource_dir("configs") / "ablations").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_ablation_of_the_package_can_be_read(path: Path) -> None:
    found = load_ablation(path)
    assert found.title and found.reference_row in found.rows


def test_rows_that_would_share_a_file_are_refused(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("rows: {a b: {}, a/b: {}}\n")
    assert "rows 'a b' and 'a/b' would share a file" in failure(capsys, str(file))


def test_the_first_row_is_the_reference_unless_one_is_named() -> None:
    rows = {"b": AblationRow(), "a": AblationRow()}
    assert Ablation(rows=rows).reference_row == "b" and Ablation(rows=rows, reference="a").reference_row == "a"
    with pytest.raises(ConfigError, match="at least one row"):
        Ablation()
