"""`python -m posemap_fast.bench`: verified before timed, slower than the baseline is exit code 1, bad input is 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from posemap_fast import ops
from posemap_fast.bench import cli
from posemap_fast.bench.case import BenchContext, Comparison, Skipped, suite_names
from posemap_fast.bench.runner import Options, run_family
from posemap_fast.bench.schema import problems, read_report
from posemap_fast.bench.suites import FAMILIES
from posemap_fast.bench.timing import peak_memory_mib
from posemap_fast.registry import Registry


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch) -> None:
    """Children would not see what a test plants."""
    monkeypatch.setattr(cli, "run_family_apart", run_family)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)


@pytest.fixture
def families(monkeypatch) -> Registry:
    """An empty registry in the place of the package's."""
    own: Registry = Registry("benchmark")
    for module in ("cli", "runner", "case"):
        monkeypatch.setattr(f"posemap_fast.bench.{module}.FAMILIES", own)
    return own


def bench(*words: str) -> int:
    return cli.main(["--device", "cpu", "--threads", "1", "--seconds", "0.05", *words])


def smoke(only: str, *words: str) -> int:
    return bench("--suite", "ops", "--smoke", "--only", only, *words)


def test_a_report_keeps_to_its_format(tmp_path: Path, capsys) -> None:
    file = tmp_path / "report.json"
    assert smoke("compact/*", "--json", str(file)) == 0
    report = read_report(file)
    (row,) = report["results"]
    assert (row["case"], row["family"], row["peer"]) == ("compact/forward/smoke", "ops/compact", "plain torch")
    assert row["verified"] and row["value"] > 0 and row["repeats"] >= 1 and row["p50"] <= row["p99"]
    assert row["ratio_to_reference"] == pytest.approx(row["peer_value"] / row["value"])
    assert report["metadata"]["ceilings"]["copy_bytes_per_s"] > 0
    assert "compact/forward/smoke" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A report of one case, made by a process of its own."""
    file = tmp_path_factory.mktemp("bench") / "report.json"
    words = [
        "--suite",
        "ops",
        "--smoke",
        "--only",
        "compact/*",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--json",
        str(file),
    ]
    assert subprocess.run([sys.executable, "-m", "posemap_fast.bench", *words], check=False).returncode == 0
    return file


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda r: r.pop("metadata"), "report: has no 'metadata'"),
        (lambda r: r.update(schema=2), "report.schema: is 2"),
        (lambda r: r["results"][0].update(value=None), "is verified and has no value"),
        (lambda r: r["results"][0].update(verified=False), "has a value and is not verified"),
        (lambda r: r["results"][0].update(value="fast"), "results[0].value: is 'fast'"),
        (lambda r: r["results"][0].update(repeats=True), "results[0].repeats: is True"),
        (lambda r: r["results"][0].pop("peer"), "results[0]: has no 'peer'"),
        (lambda r: r["results"][0].update(comment=""), "results[0]: unknown 'comment'"),
        (lambda r: r["results"].append(r["results"][0]), "comes twice"),
        (lambda r: r["skipped"].append("march"), "skipped[0]: must be an object"),
    ],
)
def test_departures_from_the_format_are_told(stored: Path, change, told: str) -> None:
    report = json.loads(stored.read_text())
    change(report)
    assert any(told in problem for problem in problems(report)), problems(report)


def test_a_wrong_result_is_not_timed(monkeypatch, tmp_path: Path, capsys) -> None:
    def wrong(*arguments, **options):
        found = original(*arguments, **options)
        return found._replace(indices=found.indices.flip(0))

    original = ops.compact
    monkeypatch.setattr(ops, "compact", wrong)
    file = tmp_path / "report.json"
    assert smoke("compact/*", "--json", str(file)) == 1
    (row,) = read_report(file)["results"]
    assert not row["verified"] and row["value"] is None and row["ratio_to_reference"] is None
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0])
def test_an_error_that_is_no_number_is_a_wrong_result(families: Registry, value: float) -> None:
    families.register("mine/a")(lambda context: iter([Comparison("a", lambda: None, lambda: value, 1.0)]))
    (row,) = run_family("mine/a", Options("cpu", 1)).rows
    assert not row["verified"] and row["error"] == (2.0 if value == 2 else None)


def test_a_sleep_in_an_op_is_found_against_the_baseline(monkeypatch, tmp_path: Path, capsys) -> None:
    file = tmp_path / "before.json"
    assert smoke("comp*/forward/*", "--json", str(file)) == 0
    before = {row["case"] for row in read_report(file)["results"]}
    assert before == {"compact/forward/smoke", "composite/forward/smoke"}
    original = ops.compact

    def slow(*arguments, **options):
        time.sleep(0.2)
        return original(*arguments, **options)

    monkeypatch.setattr(ops, "compact", slow)
    after = tmp_path / "after.json"
    capsys.readouterr()
    words = ["--tolerance", "0.9", "--json", str(after)]  # timed for milliseconds beside other tests
    assert smoke("compact/*", "--baseline", str(file), *words) == 1
    assert "SLOWER: compact/forward/smoke (plain torch)" in capsys.readouterr().out
    (row,) = read_report(after)["results"]
    assert row["ratio_to_baseline"] < 0.1
    monkeypatch.setattr(ops, "compact", original)
    assert smoke("compact/*", "--baseline", str(after), *words[:2]) == 0  # faster is no fault


def test_a_case_that_cannot_run_here_is_named_with_its_reason(families: Registry, tmp_path: Path, capsys) -> None:
    def family(context: BenchContext):
        yield Skipped("needs a GPU", "torch sees none")
        yield Comparison("runs", lambda: None, lambda: 0.0, 0.0)

    families.register("mine/a")(family)
    file = tmp_path / "report.json"
    assert bench("--suite", "mine", "--json", str(file)) == 0
    assert read_report(file)["skipped"] == [{"case": "needs a GPU", "reason": "torch sees none"}]
    assert "not run: needs a GPU: torch sees none" in capsys.readouterr().out


def test_measured_times_are_taken_as_they_are(families: Registry) -> None:
    calls: list[int] = []
    case = Comparison("long", lambda: calls.append(1), lambda: 0.0, 0.0, measured_ms=7000.0, work=2, work_unit="scenes")
    families.register("mine/a")(lambda context: iter([case]))
    (row,) = run_family("mine/a", Options("cpu", 1)).rows
    assert calls == [] and row["value"] == 7000 and row["repeats"] == 1 and row["rate"] == pytest.approx(2 / 7)


def test_measured_times_have_peers_that_were_measured_beside_them(families: Registry) -> None:
    def family(context: BenchContext):
        for name, error in (("right", 0.0), ("wrong", 1.0)):
            peers = {"yardstick": 3500.0}
            yield Comparison(
                name, lambda: None, lambda error=error: error, 0.5, measured_ms=7000.0, measured_peers_ms=peers
            )

    families.register("mine/a")(family)
    right, wrong = run_family("mine/a", Options("cpu", 1)).rows
    assert (right["peer"], right["peer_value"], right["ratio_to_reference"]) == ("yardstick", 3500.0, 0.5)
    assert (wrong["peer"], wrong["value"], wrong["ratio_to_reference"]) == ("yardstick", None, None)


def test_a_case_is_timed_in_turn_or_measured_once() -> None:
    with pytest.raises(AssertionError, match="mine"):
        Comparison("mine", lambda: None, lambda: 0.0, 0.0, {"them": lambda: None}, measured_ms=1.0)
    with pytest.raises(AssertionError, match="mine"):
        Comparison("mine", lambda: None, lambda: 0.0, 0.0, measured_peers_ms={"them": 1.0})


def test_peers_are_timed_in_turn_with_us(families: Registry) -> None:
    order: list[str] = []

    def side(name: str, seconds: float):
        def run() -> None:
            order.append(name)
            time.sleep(seconds)

        return run

    case = Comparison("a", side("ours", 0.002), lambda: 0.0, 0.0, {"theirs": side("theirs", 0.02)}, min_repeats=3)
    families.register("mine/a")(lambda context: iter([case]))
    (row,) = run_family("mine/a", Options("cpu", 1, seconds=0.01)).rows
    assert 2 < row["ratio_to_reference"] < 20
    last = order.index("theirs", len(order) - order[::-1].index("theirs") - 1)
    assert "ours" in order[order.index("theirs") : last]


def test_memory_is_what_a_run_needs_above_what_is_held() -> None:
    held = torch.ones(100 << 20, dtype=torch.uint8)
    for _ in range(2):
        found = peak_memory_mib(lambda: torch.ones(50 << 20, dtype=torch.uint8).max(), torch.device("cpu"))
        assert found is None or 40 < found < 80
    assert len(held)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--suite", "opps"], "--suite opps: no such suite (known: all, smoke, "),
        (["--only", "nothing*", "--suite", "ops", "--smoke"], "--only nothing*: no such case"),
        (["--tolerance", "2"], "--tolerance must be between 0 and 1"),
        (["--baseline", "missing.json"], "missing.json: No such file"),
        (["--compare", "missing.json", "missing.json"], "missing.json: No such file"),
        (["--history", "."], "--history .: no reports"),
    ],
)
def test_bad_input_is_one_line(words: list[str], told: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if "nothing*" in words:
        monkeypatch.setattr(cli, "_families", lambda wanted: ["ops/compact"])
    assert bench(*words) == 2
    error = capsys.readouterr().err
    assert told in error and error.strip().count("\n") == 0


def test_a_damaged_baseline_is_refused(tmp_path: Path, capsys) -> None:
    file = tmp_path / "report.json"
    file.write_text('{"schema": 1')
    assert bench("--baseline", str(file)) == 2
    assert "not JSON" in capsys.readouterr().err


def test_reports_can_be_compared_and_plotted(stored: Path, tmp_path: Path, capsys) -> None:
    file = shutil.copy(stored, tmp_path / "a.json")
    report = json.loads(stored.read_text())
    for key in ("value", "p50"):
        report["results"][0][key] *= 2
    report["results"][0]["ratio_to_reference"] /= 2
    (tmp_path / "b.json").write_text(json.dumps(report))
    capsys.readouterr()
    assert bench("--compare", str(file), str(tmp_path / "b.json")) == 0
    out = capsys.readouterr().out
    assert "0.50x" in out and "0 of 1 cases differ by 15 % or less" in out
    plot = tmp_path / "history.svg"
    assert bench("--history", str(tmp_path), "--plot", str(plot)) == 0
    assert "<svg" in plot.read_text()


def test_a_line_of_the_history_ends_with_its_machine(stored: Path, tmp_path: Path, monkeypatch) -> None:
    report = json.loads(stored.read_text())
    for name, extensions in (("a", []), ("b", ["amx_tile"])):
        report["metadata"]["environment"]["vector_extensions"] = extensions
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    drawn: list[list[float]] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *args, **kw: drawn.append(list(x)) or plot(self, x, *args, **kw))
    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda self, text: titles.append(text))
    assert bench("--history", str(tmp_path), "--plot", str(tmp_path / "history.svg")) == 0
    assert sorted(x for line in drawn for x in line) == [0, 1] and all(len(line) == 1 for line in drawn)
    assert "A: " in titles[0] and ", AMX, " in titles[0]


def test_the_list_says_what_each_family_measures(capsys) -> None:
    assert bench("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    suites = tuple(f"{name}/" for name in suite_names())
    assert len([line for line in lines if line.startswith(suites)]) == len(list(FAMILIES))
    assert all(len(line.split(": ", 1)[1]) > 10 and "partial(" not in line for line in lines)
