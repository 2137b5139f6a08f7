"""The printed tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from posemap_fast.bench.compare import Change
from posemap_fast.bench.machine import machine_name

__all__ = ["print_changes", "print_report"]


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """The table of a report, and what was left out or went wrong."""
    about = report["metadata"]
    ceilings = about["ceilings"]
    console.print(
        f"{machine_name(about)}, device {about['device']}, torch "
        f"{about['environment']['torch']}, commit {about['commit']}, load {about['load_1min']:.2f}; ceilings: copy "
        f"{ceilings['copy_bytes_per_s'] / 1e9:.1f} GB/s, float32 product {ceilings['gemm_flops_per_s'] / 1e9:.0f} "
        "GFLOP/s"
    )
    with_baseline = any(row["ratio_to_baseline"] is not None for row in report["results"])
    columns = ["case", "ours ms (IQR)", "per second", "of copy", "of product", "peer", "peer ms (IQR)", "ratio"]
    table = Table(*columns, *(["vs baseline"] if with_baseline else []))
    for column in table.columns:
        column.justify = "left" if column.header in ("case", "peer") else "right"
    for row in report["results"]:
        table.add_row(*_cells(row, ceilings, with_baseline))
    console.print(table)
    _print_notes(report["results"], console)
    for key, word in (("skipped", "not run"), ("failed", "FAILED")):
        for entry in report[key]:
            console.print(f"{word}: {entry['case']}: {entry['reason']}", markup=False)


def _cells(row: Mapping[str, Any], ceilings: Mapping[str, float], with_baseline: bool) -> list[str]:
    if not row["verified"]:
        error = "inf" if row["error"] is None else f"{row['error']:.1e}"
        wrong = f"WRONG: error {error}, allowed {row['tolerance']:.0e}"
        return [row["case"], wrong, *[""] * 3, row["peer"], "", "", *([""] if with_baseline else [])]
    cells = [
        row["case"],
        f"{_ms(row['value'])} ({_ms(row['iqr'])})",
        f"{_short(row['rate'])} {row['rate_unit'].removesuffix('/s')}",
        _share(row["bytes_per_s"], ceilings["copy_bytes_per_s"]),
        _share(row["flops_per_s"], ceilings["gemm_flops_per_s"]),
        row["peer"],
        "" if row["peer_value"] is None else f"{_ms(row['peer_value'])} ({_ms(row['peer_iqr'])})",
        "" if row["ratio_to_reference"] is None else f"{row['ratio_to_reference']:.2f}x",
    ]
    change = row["ratio_to_baseline"]
    return cells + ([("" if change is None else f"{change:.2f}x")] if with_baseline else [])


def _print_notes(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The further figures of each case, once; a figure of the paper with its ratio to ours."""
    told = set()
    for row in rows:
        if not row["notes"] or row["case"] in told:
            continue
        told.add(row["case"])
        notes = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row["notes"].items()
        ]
        paper = row["notes"].get("paper_ms")
        if paper is not None and row["value"]:
            notes.append(f"{paper / row['value']:.2f}x the paper's speed")
        console.print(f"{row['case']}: {', '.join(notes)}", markup=False)


def print_changes(found: Sequence[Change], tolerance: float, console: Console) -> None:
    """Two reports side by side, the slowest first, and how many cases stayed within the tolerance."""
    table = Table("case", "peer", "new / old speed", "compared by")
    for change in sorted(found, key=lambda c: c.ratio):
        table.add_row(change.case, change.peer, f"{change.ratio:.2f}x", change.basis)
    console.print(table)
    same = sum(1 / (1 + tolerance) <= change.ratio <= 1 + tolerance for change in found)
    console.print(f"{same} of {len(found)} cases differ by {100 * tolerance:.0f} % or less")


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _short(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {letter}"
    return f"{value:.3g}"


def _share(value: float | None, ceiling: float) -> str:
    return "" if value is None else f"{100 * value / ceiling:.0f} %"
