"""Gathers what tools/gpu_check.sh left in a folder into gpu_check.json, and prints it as a table.

python benchmarks/gpu_report.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from posemap_fast.bench.report import print_report as print_bench
from posemap_fast.files import write_text

_SIGNALS = {124: "ran past its limit", 137: "killed at its limit"}


def read_json(path: Path) -> Any:
    """Content of a JSON file, None when it is missing or broken (its step then failed)."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None


def read_steps(folder: Path) -> list[dict[str, Any]]:
    """Rows of the steps that have run into this folder."""
    path = folder / "steps.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def gather(folder: Path) -> dict[str, Any]:
    """Steps, environment and figures."""
    return {
        "schema": 1,
        "steps": read_steps(folder),
        "environment": read_json(folder / "environment.log"),
        "backbones": read_json(folder / "backbones.json"),
        "bench": read_json(folder / "bench.json"),
        "inference": read_json(folder / "inference.json"),
        "pipeline": read_json(folder / "run" / "summary.json"),
    }


def print_report(report: dict[str, Any], console: Console) -> None:
    """The steps, then the figures that there are."""
    table = Table("step", "result", "seconds", title="gpu_check")
    for step in report["steps"]:
        status = step["status"]
        result = "passed" if status == 0 else _SIGNALS.get(status, f"failed with exit code {status}")
        table.add_row(step["step"], result, f"{step['seconds']} of {step['limit']}")
    console.print(table)
    if report["backbones"] is not None:
        rows = report["backbones"]["results"]
        figures = Table(*rows[0], title="backbones")
        for row in rows:
            figures.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(figures)
    for name in ("bench", "inference"):
        if report[name] is not None:
            print_bench(report[name], console)


def report(folder: Path) -> None:
    """Write OUT/gpu_check.json and print the table."""
    gathered = gather(folder)
    write_text(folder / "gpu_check.json", json.dumps(gathered, indent=1) + "\n")
    print_report(gathered, Console(width=160))


def main() -> int:
    """The report of one folder."""
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "steps.jsonl").is_file():
        print("usage: python benchmarks/gpu_report.py OUT  (a folder that tools/gpu_check.sh wrote)", file=sys.stderr)
        return 2
    report(Path(sys.argv[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
