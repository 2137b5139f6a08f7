"""Two reports side by side: what became slower, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Change", "changes", "slower", "with_baseline"]


@dataclass(frozen=True)
class Change:
    """One case in two reports.

    Attributes:
        ratio: new speed over old speed. Of the ratios to the peer where both have one: a peer that was timed in turn
            with us takes the machine's load out. Of the times otherwise. 1 is no change, less is slower.
        basis: `ratio` or `time`, what was compared.
    """

    case: str
    peer: str
    ratio: float
    basis: str


def changes(new: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> list[Change]:
    """The cases with a value in both."""
    before = {(row["case"], row["peer"]): row for row in old if row["value"]}
    found = []
    for row in new:
        match = before.get((row["case"], row["peer"]))
        if match is None or not row["value"]:
            continue
        if row["ratio_to_reference"] and match["ratio_to_reference"]:
            ratio, basis = row["ratio_to_reference"] / match["ratio_to_reference"], "ratio"
        else:
            ratio, basis = match["value"] / row["value"], "time"
        found.append(Change(row["case"], row["peer"], ratio, basis))
    return found


def slower(found: Sequence[Change], tolerance: float) -> list[Change]:
    """Those that lost more than `tolerance` (a share) of their speed, the worst first."""
    return sorted((c for c in found if c.ratio < 1 - tolerance), key=lambda c: c.ratio)


def with_baseline(rows: Sequence[Mapping[str, Any]], found: Sequence[Change]) -> list[dict[str, Any]]:
    """The rows with `ratio_to_baseline`, None where the baseline has no such case."""
    ratios = {(change.case, change.peer): change.ratio for change in found}
    return [dict(row) | {"ratio_to_baseline": ratios.get((row["case"], row["peer"]))} for row in rows]
