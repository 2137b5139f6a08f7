"""`posemap ablate` on a miniature of the scene `room`: what is shared, what is kept, what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from posemap_fast import ablation, stages
from posemap_fast.ablation_results import RowResult
from posemap_fast.cli import main
from posemap_fast.commands import ablate as command
from posemap_fast.errors import DatasetError
from posemap_fast.render import ImagePoseConfig
from posemap_fast.results import model_errors
from posemap_fast.train import APRStage, random_views

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = """\
title: a miniature
preset: smoke
set:
  - data.room_train=12
  - data.room_test=4
  - data.room_width=32
  - data.network_side=0
  - network.input_size=[24, 32]
  - field.log2_hashmap_size=10
  - render.steps_per_unit=48
  - render.occupancy.resolution=16
  - nerf.steps=10
  - nerf.samples_per_step=1024
  - posemap.steps=3
  - apr.steps=4
  - apr.batch=2
  - apr.rvs_batch=2
  - apr.validate_every=2
  - align.steps=1
  - align.image_pose.steps=2
  - checkpoint_every_s=0
  - threads=1
  - device=cpu  # compared bit by bit: a GPU adds in any order
reference: full
outliers: 2
rows:
  full: {}
  no posemap: {set: [apr.weights.posemap=0, apr.weights.rvs_posemap=0], note: neither L_posemap}
  fewer views: {set: [apr.rvs_batch=1]}
  of features: {set: [field.pose_branch=features]}
  finer: {set: [field.n_levels=6]}
  with stage 4: {align: transductive}
  on every second: {align: inductive, set: [data.unlabelled_every=2]}
"""
BASELINES = ["mean training pose", "nearest training view"]


@dataclasses.dataclass
class Finished:
    """Two rows of one seed, made by one call."""

    file: Path
    out: Path
    printed: str
    n_renders: int


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread) -> Iterator[Finished]:
    folder = tmp_path_factory.mktemp("ablation")
    file, out = folder / "mini.yaml", folder / "out"
    file.write_text(TEXT)
    renders: list[object] = []
    original = random_views.render_views
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_views, "render_views", lambda *a, **o: renders.append(a) or original(*a, **o))
        words = [str(file), "--out", str(out), "--rows", "full,no posemap", "--quiet"]
        assert main(["ablate", *words]) == 0
    yield Finished(file, out, (out / "results.json").read_text(), len(renders))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """The finished folder, to be changed."""
    return shutil.copytree(finished.out, tmp_path / "out")


def ablate(finished: Finished, out: Path, rows: str, *extra: str) -> int:
    return main(["ablate", str(finished.file), "--out", str(out), "--rows", rows, "--quiet", *extra])


def stored(out: Path, row: str) -> dict:
    return json.loads((out / "room" / "seed0" / "rows" / f"{row}.json").read_text())


def errors_of(out: Path, row: str, file: str | None = None) -> tuple[list[float], list[float]]:
    entry = next(e for e in stored(out, file or row.replace(" ", "_"))["results"] if e["row"] == row)
    return entry["t_err"], entry["r_err_deg"]


def failure(capsys, *words: str) -> str:
    """The one line that a refused call prints."""
    assert main(["ablate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_results_hold_the_rows_and_the_baselines(finished: Finished) -> None:
    report = json.loads(finished.printed)
    assert [row["row"] for row in report["rows"]] == [*BASELINES, "full", "no posemap"]
    for row in report["rows"]:
        assert row["n_seeds"] == 1 and row["spread_t"] == 0 and row["median_t"] > 0
        assert row["outlier_t"] > 0 and row["metric"]
    full = report["rows"][2]
    assert full["ratio_t"] == full["ratio_r"] == 1 and full["seconds"] > 0
    t_err, _ = errors_of(finished.out, "full")
    assert len(t_err) == 4 and sum(sorted(t_err)[1:3]) / 2 == pytest.approx(full["median_t"])
    assert errors_of(finished.out, "full") != errors_of(finished.out, "no posemap")


def test_intervals_are_judged_before_and_after_alignment(finished: Finished, copy: Path, capsys, monkeypatch) -> None:
    counts = []

    def count(net, views, random, unlabelled):
        counts.append(0 if unlabelled is None else len(unlabelled.c2w))
        return model_errors(net, views, random, unlabelled)

    monkeypatch.setattr(stages, "_LEAST_UNLABELLED", 2)
    monkeypatch.setattr(ablation, "model_errors", count)
    file = copy.parent / "intervals.yaml"
    text = TEXT.replace("reference: full", "reference: with stage 4\nintervals: true")
    file.write_text(text.replace("[data.unlabelled_every=2]", "[data.unlabelled_every=2, align.min_gain=-10]"))
    table = copy.parent / "table.md"
    words = ["--out", str(copy), "--rows", "with stage 4,on every second", "--quiet", "--markdown", str(table)]
    assert main(["ablate", str(file), *words]) == 0
    assert counts == [0, 0, 26, 26]  # unlabelled frames; those of the first row are the test frames, which are scored
    rows = {row["row"]: row for row in json.loads((copy / "results.json").read_text())["rows"]}
    assert all("trust" not in rows[name] for name in BASELINES)
    for name in ("with stage 4", "with stage 4, aligned"):
        for found in rows[name]["trust"].values():
            assert 0 <= found["inside_50"] <= found["inside_90"] <= 1 and 0 < found["best"] <= found["surest"]
    lines = table.read_text().splitlines()
    head = next(line for line in lines if line.startswith("| row |"))
    aligned = next(line for line in lines if line.startswith("| with stage 4, aligned |"))
    assert "in the 50 % interval (t / r) | in the 90 % interval" in head and aligned.count("|") == head.count("|")
    capsys.readouterr()
    error = failure(capsys, str(file), "--out", str(copy), "--rows", "full", "--quiet")  # made without them
    assert "full.json: was made with another intervals" in error


ENDS = (", refined", "")


def test_answers_that_the_map_corrects_are_scored_beside_the_others(finished, copy, monkeypatch, capsys) -> None:
    file = copy.parent / "refined.yaml"
    file.write_text(
        TEXT.replace("with stage 4: {align: transductive}", "with stage 4: {align: transductive, refine: true}")
    )
    monkeypatch.setattr(ablation, "REFINEMENT", ImagePoseConfig(steps=2, rows=8))
    assert main(["ablate", str(file), "--out", str(copy), "--rows", "with stage 4", "--quiet"]) == 0
    assert "90 % below" in "".join(capsys.readouterr().out.split("│"))
    rows = [row["row"] for row in json.loads((copy / "results.json").read_text())["rows"]]
    assert rows[-2:] == ["nearest training view, refined", "with stage 4, aligned, refined"]
    before, after = ([errors_of(copy, name.removesuffix(end), "with_stage_4") for name in rows[-2:]] for end in ENDS)
    assert [len(t) for t, _ in before] == [len(t) for t, _ in after] == [4, 4]
    assert before != after  # which answers of so small a training are near enough to move depends on torch's version


def test_a_scene_that_cannot_calibrate_refined_answers_has_them_without_intervals(copy, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise DatasetError("7 views")

    file = copy.parent / "few.yaml"
    file.write_text("intervals: true\n" + TEXT.replace("  full: {}", "  full: {}\n  judged: {refine: true}"))
    monkeypatch.setattr(ablation, "calibrate_refined", refuse)
    monkeypatch.setattr(ablation, "REFINEMENT", ImagePoseConfig(steps=2, rows=8))
    assert main(["ablate", str(file), "--out", str(copy), "--rows", "judged", "--quiet"]) == 0
    rows = {row["row"]: row for row in json.loads((copy / "results.json").read_text())["rows"]}
    assert list(rows) == [*BASELINES, "judged", "nearest training view, refined", "judged, refined"]
    assert "trust" in rows["judged"] and "trust" not in rows["judged, refined"]


def test_rows_share_the_map_and_the_random_views(finished: Finished) -> None:
    maps = list((finished.out / "room" / "seed0" / "maps").iterdir())
    assert [found.name for found in maps] == [stored(finished.out, "full")["map"]]
    assert stored(finished.out, "no_posemap")["map"] == maps[0].name
    fields = list((finished.out / "room" / "seed0" / "fields").iterdir())
    assert len(fields) == 1 and len(list((fields[0] / "views").iterdir())) == 1
    assert finished.n_renders == 4  # one per step, by the first of the two networks


def test_second_call_trains_nothing_and_prints_the_same(finished: Finished, copy: Path, capsys, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a finished row needs no scene")

    monkeypatch.setattr(ablation, "read_scene", forbidden)
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*") if p.is_file() and p.name != "results.json"}
    for _ in range(2):
        assert ablate(finished, copy, "full,no posemap") == 0
    first, second = capsys.readouterr().out.split("results: ")[:2]
    table = [line for line in first.splitlines() if "│" in line]
    assert table == [line for line in second.splitlines() if "│" in line] and len(table) == 4
    assert [name in line for name, line in zip([*BASELINES, "full", "no posemap"], table, strict=True)] == [True] * 4
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (copy / "results.json").read_text() == finished.printed


def test_a_row_with_another_pose_branch_has_a_map_of_its_own_on_the_same_field(finished, copy: Path, tmp_path) -> None:
    alone = tmp_path / "alone"
    assert ablate(finished, copy, "of features") == 0
    assert stored(copy, "of_features")["map"] != stored(copy, "full")["map"]
    assert len(list((copy / "room" / "seed0" / "maps").iterdir())) == 2
    assert len(list((copy / "room" / "seed0" / "fields").iterdir())) == 1
    assert ablate(finished, alone, "of features") == 0
    assert errors_of(copy, "of features") == errors_of(alone, "of features")


def test_a_row_with_another_field_has_all_of_its_own(finished: Finished, copy: Path) -> None:
    assert ablate(finished, copy, "finer") == 0
    assert len(list((copy / "room" / "seed0" / "maps").iterdir())) == 2
    assert len(list((copy / "room" / "seed0" / "fields").iterdir())) == 2


def test_an_aligned_row_is_also_scored_on_the_unlabelled_frames(finished: Finished, copy: Path) -> None:
    assert ablate(finished, copy, "on every second") == 0
    rows = {entry["row"]: entry for entry in stored(copy, "on_every_second")["results"]}
    name = "on every second"
    assert list(rows) == [
        *BASELINES,
        name,
        f"{name}, on the unlabelled frames",
        f"{name}, aligned",
        f"{name}, aligned, on the unlabelled frames",
    ]
    n = [len(entry["t_err"]) for entry in rows.values()]
    assert n == [2, 2, 2, 26, 2, 26]  # `room` brings 24 unlabelled views, here two of its four test views join them


def test_stage_4_goes_on_from_the_network_of_another_row(finished: Finished, copy: Path, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("this network is there")

    monkeypatch.setattr(APRStage, "step", forbidden)
    assert ablate(finished, copy, "with stage 4") == 0
    assert errors_of(copy, "with stage 4") == errors_of(copy, "full")
    t_err, _ = errors_of(copy, "with stage 4, aligned", "with_stage_4")
    assert len(t_err) == 4


def test_a_row_with_other_random_views_is_the_same_in_company(finished: Finished, copy: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(copy, tmp_path / "alone")
    assert ablate(finished, alone, "fewer views") == 0
    (copy / "room" / "seed0" / "rows" / "full.json").unlink()
    assert ablate(finished, copy, "full,fewer views") == 0
    assert errors_of(copy, "full") == errors_of(finished.out, "full")
    assert errors_of(copy, "fewer views") == errors_of(alone, "fewer views")


def test_rows_with_other_random_views_keep_theirs_apart(finished: Finished, copy: Path) -> None:
    (copy / "room" / "seed0" / "rows" / "full.json").unlink()
    assert ablate(finished, copy, "full,fewer views") == 0
    (field,) = (copy / "room" / "seed0" / "fields").iterdir()
    views = field / "views"
    assert len(list(views.iterdir())) == 2


def test_an_interrupted_row_goes_on_where_it_was(finished: Finished, copy: Path, capsys, monkeypatch) -> None:
    seed = copy / "room" / "seed0"
    (seed / "rows" / "no_posemap.json").unlink()
    shutil.rmtree(seed / "networks")
    original, done = APRStage.step, []

    def step(self: APRStage, k: int) -> dict[str, float]:
        if k == 2 and len(done) == 2:
            raise KeyboardInterrupt
        done.append(k)
        return original(self, k)

    monkeypatch.setattr(APRStage, "step", step)
    assert ablate(finished, copy, "no posemap") == 130
    assert done == [0, 1] and not (seed / "rows" / "no_posemap.json").exists()
    done.append(-1)
    assert ablate(finished, copy, "no posemap") == 0
    assert done == [0, 1, -1, 2, 3]
    assert errors_of(copy, "no posemap") == errors_of(finished.out, "no posemap")


def test_another_seed_has_a_folder_of_its_own_and_joins_the_table(finished: Finished, copy: Path) -> None:
    assert ablate(finished, copy, "full", "--seeds", "0,3") == 0
    rows = {row["row"]: row for row in json.loads((copy / "results.json").read_text())["rows"]}
    assert list(rows) == [*BASELINES, "full"] and all(row["n_seeds"] == 2 for row in rows.values())
    assert rows["full"]["spread_t"] > 0 and (copy / "room" / "seed3" / "rows" / "full.json").is_file()


def markdown_of(finished: Finished, tmp_path: Path, monkeypatch, *words: str) -> str:
    """The file that the finished results are written to by this command line."""
    entries = [RowResult(**entry) for entry in stored(finished.out, "no_posemap")["results"]]
    monkeypatch.setattr(command, "run_ablation", lambda *_, **__: entries)
    arguments = ["ablate", str(finished.file), "--markdown", str(tmp_path / "table.md"), "--quiet", *words]
    if not any(word.startswith("--out") for word in words):
        arguments += ["--out", str(tmp_path / "other")]
    monkeypatch.setattr(sys, "argv", ["posemap", *arguments])
    assert main(arguments) == 0
    return (tmp_path / "table.md").read_text()


def test_markdown_says_how_it_was_made_and_not_where(finished: Finished, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "git_commit", lambda: "abc123-dirty")
    text = markdown_of(finished, tmp_path, monkeypatch, "--rows", "full,no posemap")
    shown = "- command: `posemap ablate mini.yaml --markdown table.md --quiet --rows 'full,no posemap' --out other`"
    assert shown in text.splitlines()
    assert "- commit abc123-dirty, torch " in text and "- no posemap: neither L_posemap" in text.splitlines()
    assert str(tmp_path) not in text and str(finished.file.parent) not in text
    head = "| row | median t | median r (deg) | ratio t | ratio r | seconds | seeds |"
    columns = f"{head} mean, 2 farthest | over that of all |"
    table = text.splitlines()[text.splitlines().index(columns) :]
    assert table[1] == "|" + 9 * "---|" and len(table) == 2 + 3
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in [*BASELINES, "no posemap"]]


@pytest.mark.parametrize("word", ["--scene=kitchen={}", "--out={}"])
def test_markdown_names_no_folder_behind_an_equals_sign(finished, tmp_path, monkeypatch, word: str) -> None:
    text = markdown_of(finished, tmp_path, monkeypatch, word.format(tmp_path))
    assert str(tmp_path) not in text


def test_scenes_of_the_file_are_relative_to_it(finished: Finished, tmp_path: Path, monkeypatch, capsys) -> None:
    given: list[dict[str, str]] = []
    monkeypatch.setattr(command, "run_ablation", lambda _, scenes, *__, **___: given.append(scenes) or [])
    (tmp_path / "kitchen").mkdir()
    (tmp_path / "a.yaml").write_text("scenes: [kitchen]\nrows: {full: {}}")
    main(["ablate", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out"), "--quiet"])
    assert given == [{"kitchen": str(tmp_path / "kitchen")}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "full,ful"], "no row 'ful' (rows: full, no posemap, fewer views"),
        (["--seeds", "a"], "--seeds a: give whole numbers"),
        (["--seeds", "1,1"], "--seeds 1,1: seeds must be different"),
        (["--seeds", "-1"], "--seeds -1: seeds must be different and >= 0"),
        (["--set", "apr.stepz=3"], "--set apr.stepz=3: apr: unknown key 'stepz'; did you mean 'steps'"),
        (["--set", "apr.ema=2"], "--set apr.ema=2: apr: ema must be in [0, 1)"),
        (["--scene", "no/such/folder"], "no such file or folder"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_written(finished, tmp_path, capsys, words, message) -> None:
    error = failure(capsys, str(finished.file), "--out", str(tmp_path / "out"), "--quiet", *words)
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "words", "key"),
    [
        ("full", ["--set", "apr.lr=0.5"], "config"),
        ("full", ["--set", "nerf.steps=11"], "config"),
        ("with stage 4", [], "align"),
    ],
)
def test_results_made_otherwise_are_refused_and_kept(finished, copy: Path, capsys, row, words, key) -> None:
    file = copy / "room" / "seed0" / "rows" / f"{row.replace(' ', '_')}.json"
    if row != "full":
        shutil.copy(copy / "room" / "seed0" / "rows" / "full.json", file)
    before = file.read_text()
    error = failure(capsys, str(finished.file), "--out", str(copy), "--rows", row, "--quiet", *words)
    assert f"{file}: was made with another {key}; choose another --out" in error
    assert file.read_text() == before


def test_results_of_another_scene_are_refused(finished: Finished, copy: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "capture").mkdir()
    words = ["--scene", f"room={tmp_path / 'capture'}", "--rows", "full", "--quiet"]
    error = failure(capsys, str(finished.file), "--out", str(copy), *words)
    assert "full.json: was made of another scene, or of room before it changed" in error


def test_rows_go_where_their_scene_goes(finished: Finished, copy: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Another machine has the same images elsewhere; the same folder with other images is another scene."""
    old, new = tmp_path / "old", tmp_path / "new"
    content = {str(old): "the images", str(new): "the images"}
    original = ablation.read_scene

    def read(path: str, data):
        if path not in content:
            raise DatasetError(f"{path}: no images")
        return dataclasses.replace(original("room", data), fingerprint=content[path])

    monkeypatch.setattr(ablation, "read_scene", read)
    for folder in (old, new):
        folder.mkdir()
    words = [str(finished.file), "--out", str(copy), "--rows", "full", "--quiet", "--scene"]
    shutil.rmtree(copy / "room" / "seed0" / "rows")
    assert main(["ablate", *words, f"room={old}"]) == 0
    before = stored(copy, "full")
    assert before["identity"] == str(old) and before["fingerprint"] == "the images"
    assert main(["ablate", *words, f"room={new}"]) == 0
    assert stored(copy, "full") == before
    content[str(new)] = "other images"
    assert f"or of {old} before it changed" in failure(capsys, *words, f"room={new}")
    content[str(old)] = "other images"
    assert f"or of {old} before it changed" in failure(capsys, *words, f"room={old}")
    content.clear()  # the table of finished rows can be printed without the images, in their own place
    assert main(["ablate", *words, f"room={old}"]) == 0
    assert "full.json: was made of another scene" in failure(capsys, *words, f"room={new}")


def test_the_procedural_scene_can_have_a_name(finished: Finished, copy: Path) -> None:
    before = stored(copy, "full")
    assert ablate(finished, copy, "full", "--scene", "room=room") == 0 and stored(copy, "full") == before


def test_a_new_row_does_not_take_the_map_of_another_scene(finished, copy: Path, tmp_path, monkeypatch) -> None:
    (tmp_path / "capture").mkdir()
    original = ablation.read_scene
    other = "another capture"
    monkeypatch.setattr(
        ablation, "read_scene", lambda _, data: dataclasses.replace(original("room", data), fingerprint=other)
    )
    assert ablate(finished, copy, "with stage 4", "--scene", f"room={tmp_path / 'capture'}") == 0
    assert stored(copy, "with_stage_4")["map"] != stored(copy, "full")["map"]


def test_a_damaged_row_is_named(finished: Finished, copy: Path, capsys) -> None:
    file = copy / "room" / "seed0" / "rows" / "full.json"
    file.write_text(file.read_text()[:100])
    error = failure(capsys, str(finished.file), "--out", str(copy), "--rows", "full", "--quiet")
    assert f"{file}: not JSON; remove it" in error


PICTURES = """\
title: fields
measure: pictures
reference: plain
rows:
  plain: {set: [field.appearance_dim=0]}
  lit: {}
"""


def test_pictures_are_judged_without_a_network(finished: Finished, tmp_path: Path, capsys, monkeypatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("no network is asked for")

    monkeypatch.setattr(APRStage, "step", forbidden)
    common = TEXT[TEXT.index("preset") : TEXT.index("reference")]
    file = tmp_path / "pictures.yaml"
    file.write_text(common + PICTURES, encoding="utf-8")
    words = ["ablate", str(file), "--out", str(tmp_path / "out"), "--markdown", str(tmp_path / "t.md"), "--quiet"]
    assert main(words) == 0
    report = json.loads((tmp_path / "out" / "results.json").read_text())
    plain, lit = report["rows"]
    assert (plain["row"], lit["row"], plain["gain_db"]) == ("plain", "lit", 0.0)
    assert lit["gain_db"] == lit["psnr_db"] - plain["psnr_db"] != 0
    assert all(row["psnr_db"] > 3 and 0 < row["ssim"] < 1 and row["samples_per_ray"] > 0 for row in (plain, lit))
    assert "PSNR (dB)" in (tmp_path / "t.md").read_text()
    before = capsys.readouterr().out
    monkeypatch.setattr(ablation, "read_scene", forbidden)
    assert main(words) == 0
    assert capsys.readouterr().out == before


def test_how_others_are_aligned_does_not_make_a_row_another_one(finished: Finished, copy: Path) -> None:
    before = errors_of(copy, "full")
    assert ablate(finished, copy, "full", "--set", "align.steps=2") == 0
    assert errors_of(copy, "full") == before
