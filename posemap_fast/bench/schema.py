"""The report's format: what every reader may rely on, and the check of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posemap_fast.errors import FileFormatError

__all__ = ["SCHEMA", "problems", "read_report"]

SCHEMA = 1
_NUMBER, _MAYBE = (int, float), (int, float, type(None))
_REPORT: dict[str, Any] = {"schema": int, "metadata": dict, "results": list, "skipped": list, "failed": list}
_METADATA: dict[str, Any] = {
    "commit": str,
    "command": str,
    "date": str,
    "device": str,
    "threads": int,
    "smoke": bool,
    "load_1min": _MAYBE,
    "dtype": str,
    "seed": int,
    "ceilings": dict,
    "environment": dict,
}
_ROW: dict[str, Any] = {
    "case": str,
    "family": str,
    "unit": str,
    "verified": bool,
    "error": _MAYBE,
    "tolerance": _NUMBER,
    "notes": dict,
    "value": _MAYBE,  # median of our side, in `unit`
    "iqr": _MAYBE,
    "p50": _MAYBE,
    "p95": _MAYBE,
    "p99": _MAYBE,
    "repeats": (int, type(None)),
    "peak_memory_mib": _MAYBE,
    "rate": _MAYBE,
    "rate_unit": (str, type(None)),
    "bytes_per_s": _MAYBE,
    "flops_per_s": _MAYBE,
    "peer": str,  # empty: none
    "peer_value": _MAYBE,
    "peer_iqr": _MAYBE,
    "ratio_to_reference": _MAYBE,  # speed over the peer's: more is better
    "ratio_to_baseline": _MAYBE,
}
_NAMED = {"case": str, "reason": str}


def problems(report: Any) -> list[str]:
    """Where a report departs from the format; empty when it does not."""
    found = _check("report", report, _REPORT)
    if found:
        return found
    if report["schema"] != SCHEMA:
        return [f"report.schema: is {report['schema']}, this version reads {SCHEMA}"]
    found = _check("metadata", report["metadata"], _METADATA)
    for i, row in enumerate(report["results"]):
        found += _check(f"results[{i}]", row, _ROW)
        if not found and row["verified"] and row["value"] is None:
            found.append(f"results[{i}]: {row['case']} is verified and has no value")
        if not found and not row["verified"] and row["value"] is not None:
            found.append(f"results[{i}]: {row['case']} has a value and is not verified")
    for key in ("skipped", "failed"):
        for i, entry in enumerate(report[key]):
            found += _check(f"{key}[{i}]", entry, _NAMED)
    keys = [(row["case"], row["peer"]) for row in report["results"]] if not found else []
    return found + [f"results: {key} comes twice" for key in sorted(set(keys)) if keys.count(key) > 1]


def _check(where: str, value: Any, wanted: Mapping[str, Any]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: must be an object"]
    found = [f"{where}: has no '{key}'" for key in wanted if key not in value]
    found += [f"{where}: unknown '{key}'" for key in value if key not in wanted]
    for key, kind in wanted.items():
        is_bool = isinstance(value.get(key), bool) and kind is not bool  # a bool is an int to isinstance
        if key in value and (is_bool or not isinstance(value[key], kind)):
            found.append(f"{where}.{key}: is {value[key]!r}")
    return found


def read_report(path: Path) -> dict[str, Any]:
    """A report that keeps to the format.

    Raises:
        FileFormatError: it cannot be read, is not JSON, or departs from the format.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileFormatError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise FileFormatError(f"{path}: not JSON ({error})") from error
    found = problems(report)
    if found:
        raise FileFormatError(f"{path}: not a report of the benchmarks: {found[0]}")
    return report
