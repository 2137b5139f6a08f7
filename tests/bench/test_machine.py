"""What a report says of its machine does not say where things lie there."""

from __future__ import annotations

import sys

from posemap_fast.bench.machine import describe_machine


def test_a_report_holds_no_folders_of_the_machine(tmp_path, monkeypatch) -> None:
    words = ["bench", "--suite", "ops", "--only", "composite/*", "--json", str(tmp_path / "here.json")]
    monkeypatch.setattr(sys, "argv", words)
    about = describe_machine("cpu", 1, is_smoke=True)
    assert about["command"] == "python -m posemap_fast.bench --suite ops --only composite/* --json here.json"
    library = about["environment"]["native_cpu"]["found"]
    assert library is None or library == "libpmf_cpu.so"
