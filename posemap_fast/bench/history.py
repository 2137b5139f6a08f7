"""The plot of how ratios went over the reports: a panel per family, a stretch of each panel per machine."""

from __future__ import annotations

import itertools
import posixpath
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from posemap_fast.bench.machine import machine_name

__all__ = ["write_history"]

Report = Mapping[str, Any]

_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626", "#0891b2", "#65a30d", "#be185d")
_STYLES = ("-", "--", ":")
_COLUMNS = 2
_LEAST_SPAN = 2.0  # of an axis: what hardly differs shall look so
_TICKS = (1, 1.5, 2, 3, 5, 7)
_STYLE: Any = {"font.size": 7, "axes.grid": True, "svg.hashsalt": "posemap_fast", "legend.frameon": False}


def write_history(reports: Sequence[Report], path: Path) -> None:
    """Speed over the peers' by report, machine after machine and each in the order of time; the suffix is the format.

    A ratio belongs to its machine, so lines end where one does.
    """
    ordered = sorted(reports, key=lambda report: (machine_name(report["metadata"]), report["metadata"]["date"]))
    machines = {machine_name(report["metadata"]): None for report in ordered}
    stretches = [[report for report in ordered if machine_name(report["metadata"]) == name] for name in machines]
    families = {row["family"]: None for report in ordered for row in report["results"] if row["ratio_to_reference"]}
    n_rows = max(1, -(-len(families) // _COLUMNS))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13, 1.2 + 2.3 * n_rows), layout="constrained")
        for k, family in enumerate(families):
            _draw(figure.add_subplot(n_rows, _COLUMNS, k + 1), family, stretches)
        told = [f"{letter}: {name}" for letter, name in zip(_letters(), machines, strict=False)]
        figure.suptitle("speed over the peer's, more is better;  " + ";  ".join(told))
        figure.savefig(path)


def _letters() -> Iterable[str]:
    """Names of the machines within the plot."""
    return itertools.cycle(string.ascii_uppercase)


def _draw(axes: Axes, family: str, stretches: Sequence[Sequence[Report]]) -> None:
    """One line per case and peer of a family, broken between machines."""
    found = [[_ratios(report, family) for report in group] for group in stretches]
    keys = sorted({key for group in found for ratios in group for key in ratios})
    looks = [(colour, style) for style in _STYLES for colour in _COLOURS]
    peers, labels = {peer for _, peer in keys}, _labels(keys)
    for key, (colour, style) in zip(keys, itertools.cycle(looks), strict=False):
        label, x = labels[key], 0
        for group in found:
            points = [(x + k, ratios[key]) for k, ratios in enumerate(group) if key in ratios]
            if points:
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, color=colour, label=label)
                label = "_"  # not in the legend
            x += len(group)
    edges = list(itertools.accumulate(map(len, stretches)))[:-1]
    for edge in edges:
        axes.axvline(edge - 0.5, color="#8a9099", linewidth=1)
    names = [
        f"{letter} {report['metadata']['date'][:10]}\n{report['metadata']['commit'][:8]}"
        for letter, group in zip(_letters(), stretches, strict=False)
        for report in group
    ]
    axes.set_xticks(range(len(names)), names, fontsize=6, rotation=0 if len(names) < 5 else 90)
    axes.set(yscale="log", xlim=(-0.5, len(names) - 0.5))
    low, high = axes.get_ylim()
    middle, span = (low * high) ** 0.5, max(high / low, _LEAST_SPAN) ** 0.5
    axes.set_ylim(middle / span, middle * span)
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(f"{family} against {peers.pop()}" if len(peers) == 1 else family, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1.03), fontsize=6)


def _ratios(report: Report, family: str) -> dict[tuple[str, str], float]:
    """Case and peer -> ratio, of the rows of a family that have one."""
    rows = (row for row in report["results"] if row["family"] == family and row["ratio_to_reference"])
    return {(row["case"], row["peer"]): row["ratio_to_reference"] for row in rows}


def _labels(keys: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What tells the cases of a family apart: without the folders that all have, the peer where there are several."""
    keys = list(keys)
    shared = posixpath.commonpath([posixpath.dirname(case) for case, _ in keys])
    several = len({peer for _, peer in keys}) > 1
    return {(c, p): c.removeprefix(shared).lstrip("/") + (f" vs {p}" if several else "") for c, p in keys}
