"""Several passes over the same cases: of each side, the pass with the lowest median.

Other work only ever adds time. Where it comes and goes within seconds the median of a pass is enough; but a virtual
machine may be slow for a minute (two cores that are threads of one, neighbours in its cache), and a process may be slow
as long as it lives (memory that the host backs with small pages). Passes lie a minute or more apart, in new processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["best_of"]

Row = Mapping[str, Any]

_OURS = ("value", "iqr", "p50", "p95", "p99", "rate", "bytes_per_s", "flops_per_s")
_PEERS = ("peer_value", "peer_iqr")


def best_of(first: Sequence[Row], again: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows of the first pass, with the times of another one for the sides that were faster in it.

    Args:
        first: verified, with everything else that is told of a case.
        again: of the same families; cases that are not in `first`, or are wrong there, are left out.
    """
    others = {_key(row): row for row in again}
    return [_better(row, others[_key(row)]) if _key(row) in others else dict(row) for row in first]


def _key(row: Row) -> tuple[str, str]:
    return row["case"], row["peer"]


def _better(row: Row, other: Row) -> dict[str, Any]:
    if not row["verified"]:
        return dict(row)
    best = dict(row) | {"repeats": row["repeats"] + other["repeats"]}
    for fields in (_OURS, _PEERS):
        if row[fields[0]] is not None and other[fields[0]] < row[fields[0]]:
            best |= {field: other[field] for field in fields}
    if best["peer_value"] is not None:
        best["ratio_to_reference"] = best["peer_value"] / best["value"]
    return best
