"""metrics.jsonl: one row per logged step; truncated to the checkpoint on resume so that no row repeats."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends rows {"stage", "step", "name", "value", "seconds"} to a file."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def write(self, stage: str, step: int, values: dict[str, float], seconds: float) -> None:
        """Append one row per value."""
        rows = [
            json.dumps({"stage": stage, "step": step, "name": name, "value": value, "seconds": round(seconds, 3)})
            for name, value in values.items()
        ]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(row + "\n" for row in rows))

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size

    def truncate(self, n_bytes: int) -> None:
        """Forget everything after `n_bytes`: rows of steps that will be done again."""
        if self.size() > n_bytes:
            with self.path.open("r+b") as file:
                file.truncate(n_bytes)

    def rows(self) -> list[dict[str, float | str]]:
        """All rows."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
