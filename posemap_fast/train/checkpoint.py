"""Checkpoints of a stage: whole or absent, read without executing code, and never older than a minute.

A checkpoint holds the stage's state, the number of finished steps, the seconds spent so far and the length of
`metrics.jsonl` at that step, so that a resumed run neither repeats nor loses a row.
"""

from __future__ import annotations

import logging
import pickle
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posemap_fast.errors import FileFormatError
from posemap_fast.files import atomic_path

__all__ = ["Checkpoint", "Checkpointer"]

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """State of a stage after `step` steps."""

    step: int
    seconds: float
    log_bytes: int
    state: dict[str, Any]


class Checkpointer:
    """Reads and writes the checkpoint of one stage.

    Args:
        path: file of this stage.
        every_seconds: `due` says yes this long after the last write.
    """

    def __init__(self, path: Path, every_seconds: float = 30.0):
        self.path = path
        self.every_seconds = every_seconds
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to write again."""
        return time.monotonic() - self._last >= self.every_seconds

    def save(self, checkpoint: Checkpoint) -> None:
        """Write atomically: a kill at any moment leaves the old file or the new one."""
        with atomic_path(self.path) as temporary:
            torch.save(vars(checkpoint), temporary)
        self._last = time.monotonic()

    def load(self) -> Checkpoint | None:
        """The last checkpoint, or None when the stage has not been started.

        Raises:
            FileFormatError: the file is damaged.
        """
        if not self.path.exists():
            return None
        try:
            return Checkpoint(**torch.load(self.path, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, OSError, KeyError, ValueError) as error:
            raise FileFormatError(
                f"{self.path}: damaged checkpoint ({type(error).__name__}); delete it to repeat this stage"
            ) from error
