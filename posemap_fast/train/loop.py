"""The one training loop: runs a stage step by step, logs, saves, resumes.

A stage's randomness is a function of (seed, stage, step) only (`posemap_fast.seeding`), so a run that was killed
at any moment ends with the same parameters as one that was not.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from posemap_fast.errors import PosemapError
from posemap_fast.progress import ProgressMeter
from posemap_fast.train.checkpoint import Checkpoint, Checkpointer
from posemap_fast.train.metrics_log import MetricsLog

__all__ = ["DivergenceError", "Stage", "run_stage"]

_LOG_EVERY = 10  # steps


class DivergenceError(PosemapError):
    """A loss became NaN or infinite."""


class Stage(Protocol):
    """What the loop needs of a stage."""

    name: str
    n_steps: int

    def step(self, k: int) -> dict[str, float]:
        """Do step k (0-based) and return the numbers worth logging; `loss` must be among them."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a later step depends on: tensors, numbers, strings and containers of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


def run_stage(stage: Stage, checkpointer: Checkpointer, log: MetricsLog, meter: ProgressMeter) -> float:
    """Run a stage from its checkpoint (or the start) to its end.

    Returns:
        Seconds of training over all runs of this stage; 0 new ones when it was already finished.
    Raises:
        DivergenceError: the loss is not finite; the last checkpoint is kept.
        FileFormatError: the checkpoint is damaged.
    """
    found = checkpointer.load()
    if found is None:  # remember where this stage's log rows begin
        found = Checkpoint(0, 0.0, log.size(), stage.state_dict())
        checkpointer.save(found)
    else:
        stage.load_state_dict(found.state)
        if found.step < stage.n_steps:  # behind a finished stage stand the rows of later ones
            log.truncate(found.log_bytes)
    first, seconds = found.step, found.seconds
    if first >= stage.n_steps:
        return seconds
    begin = time.monotonic() - seconds
    with meter.task(stage.name, total=stage.n_steps, start=first) as task:
        for k in range(first, stage.n_steps):
            values = stage.step(k)
            if not math.isfinite(values["loss"]):
                raise DivergenceError(
                    f"{stage.name}: the loss became {values['loss']} at step {k + 1}; lower the learning rate "
                    "of this stage (--set) and run again"
                )
            seconds = time.monotonic() - begin
            if (k + 1) % _LOG_EVERY == 0 or k + 1 == stage.n_steps:
                log.write(stage.name, k + 1, values, seconds)
            task.update(k + 1, **values)
            if checkpointer.due() and k + 1 < stage.n_steps:
                checkpointer.save(Checkpoint(k + 1, seconds, log.size(), stage.state_dict()))
    checkpointer.save(Checkpoint(stage.n_steps, seconds, log.size(), stage.state_dict()))
    return seconds
