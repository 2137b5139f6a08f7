"""The training loop: a run that is cut anywhere and resumed equals one that is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posemap_fast.errors import FileFormatError
from posemap_fast.progress import NoProgress
from posemap_fast.seeding import step_generator
from posemap_fast.train import Checkpoint, Checkpointer, DivergenceError, MetricsLog, run_stage


class Cut(BaseException):
    """Stands for a kill."""


class Walk:
    """A random walk under Adam: its end depends on every step, on the optimizer and on the randomness."""

    name = "walk"

    def __init__(self, n_steps: int, cut_at: int | None = None):
        self.n_steps, self.cut_at = n_steps, cut_at
        self.x = torch.zeros(3, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.x], lr=0.1)

    def step(self, k: int) -> dict[str, float]:
        if k == self.cut_at:
            raise Cut
        target = torch.randn(3, generator=step_generator(0, "walk", k))
        loss = (self.x - target).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def state_dict(self) -> dict[str, Any]:
        return {"x": self.x.detach(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.x.copy_(state["x"])
        self.optimizer.load_state_dict(state["optimizer"])


def run(folder: Path, stage: Walk, every: float = 0.0) -> None:
    run_stage(stage, Checkpointer(folder / "walk.pt", every), MetricsLog(folder / "metrics.jsonl"), NoProgress())


def rows(folder: Path) -> list[tuple[Any, Any, Any]]:
    return [(r["step"], r["name"], r["value"]) for r in MetricsLog(folder / "metrics.jsonl").rows()]


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoint each step", "no checkpoint but the first"])
@pytest.mark.parametrize("cuts", [[0], [7], [13, 29], [34, 35]])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, cuts: list[int], every: float) -> None:
    whole = Walk(36)
    run(tmp_path / "whole", whole)
    for cut in cuts:
        with pytest.raises(Cut):
            run(tmp_path / "cut", Walk(36, cut), every)
    last = Walk(36)
    run(tmp_path / "cut", last, every)
    assert torch.equal(whole.x, last.x)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")


def test_finished_stage_is_loaded_and_not_run_again(tmp_path: Path) -> None:
    first = Walk(10)
    run(tmp_path, first)
    again = Walk(10, cut_at=0)
    run(tmp_path, again)
    assert torch.equal(first.x, again.x)


def test_seconds_add_up_over_resumed_runs(tmp_path: Path) -> None:
    Checkpointer(tmp_path / "walk.pt").save(Checkpoint(5, 100.0, 0, Walk(10).state_dict()))
    log = MetricsLog(tmp_path / "metrics.jsonl")
    seconds = run_stage(Walk(10), Checkpointer(tmp_path / "walk.pt"), log, NoProgress())
    assert 100.0 <= seconds < 110.0


def test_loss_that_is_not_finite_stops_the_run_with_the_mend(tmp_path: Path) -> None:
    stage = Walk(10)
    with torch.no_grad():
        stage.x.fill_(float("nan"))
    with pytest.raises(DivergenceError, match=r"walk: the loss became nan at step 1; lower the learning rate"):
        run(tmp_path, stage)


@pytest.mark.parametrize("damage", [b"", b"not a checkpoint", "half"])
def test_damaged_checkpoint_is_named(tmp_path: Path, damage: bytes | str) -> None:
    run(tmp_path, Walk(3))
    file = tmp_path / "walk.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if damage == "half" else damage)
    with pytest.raises(FileFormatError, match=r"walk\.pt: damaged checkpoint"):
        run(tmp_path, Walk(3))


def test_checkpoint_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"step": 1, "seconds": 0.0, "log_bytes": 0, "state": Evil()}, tmp_path / "walk.pt")
    with pytest.raises(FileFormatError, match="damaged checkpoint"):
        run(tmp_path, Walk(3))


def test_save_leaves_no_temporary_file(tmp_path: Path) -> None:
    run(tmp_path, Walk(3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "walk.pt"]


def test_resuming_behind_a_finished_stage_keeps_the_rows_of_later_ones(tmp_path: Path) -> None:
    run(tmp_path, Walk(20))
    MetricsLog(tmp_path / "metrics.jsonl").write("later", 10, {"loss": 1.0}, 0.0)
    run(tmp_path, Walk(20))
    assert MetricsLog(tmp_path / "metrics.jsonl").rows()[-1]["stage"] == "later"
