"""What a benchmark is: a family of comparisons, each verified before it is timed against named peers.

A family is a generator registered under `<suite>/<name>`; it sets up its inputs and yields comparisons. Setting up
happens in the generator, so that the inputs of a comparison can be freed before the next is made.
"""

from __future__ import annotations

import contextlib
import fnmatch
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from posemap_fast.registry import Registry

__all__ = ["FAMILIES", "REPEATED", "BenchContext", "Comparison", "Family", "Skipped", "suite_names"]


@dataclass(frozen=True)
class BenchContext:
    """What a family needs to know.

    Attributes:
        device: to run on.
        is_smoke: tiny sizes: that the cases work is what matters, not how long they take.
        only: pattern of the names of the cases that are wanted; a family may ask before it builds a costly one.
        work: folder of the whole run, which its processes share; None: nothing is shared.
    """

    device: torch.device
    is_smoke: bool = False
    only: str = "*"
    work: Path | None = None

    def wants(self, case: str) -> bool:
        """Whether a case of this name is to be run."""
        return fnmatch.fnmatchcase(case, self.only)

    @contextlib.contextmanager
    def kept(self, name: str) -> Iterator[Path]:
        """The folder for what families train to measure on, kept for all that ask for it by this name in a run."""
        if self.work is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
        else:
            folder = self.work / name
            folder.mkdir(parents=True, exist_ok=True)
            yield folder


@dataclass(frozen=True)
class Comparison:
    """One timed piece of work.

    Attributes:
        name: of the case, such as `hash_encode/forward_backward/large`.
        run: the work, ours; what it returns is dropped.
        verify: relative error of our result against the reference, and of the peers' where they are not the reference
            themselves; the largest counts. Called once, before any timing; NaN is as bad as infinity.
        tolerance: of that error.
        peers: name -> the same work done by somebody else.
        work, work_unit: what one run gets done, such as 2**18 "points"; gives the column of rates.
        n_bytes, n_flops: least memory traffic and arithmetic of one run: give its share of the machine's ceilings.
        notes: further figures of the case, such as samples per ray; they are printed and stored, not compared.
        min_repeats: timed runs per side, at least.
        measured_ms: time of work that was done once and is too long to be repeated: `run` is not called.
        measured_peers_ms: then also those of its peers, by name.
    """

    name: str
    run: Callable[[], object]
    verify: Callable[[], float]
    tolerance: float
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    work: float = 1.0
    work_unit: str = "runs"
    n_bytes: float = 0.0
    n_flops: float = 0.0
    notes: Mapping[str, float | str] = field(default_factory=dict)
    min_repeats: int = 5
    measured_ms: float | None = None
    measured_peers_ms: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert not (self.peers if self.measured_ms is not None else self.measured_peers_ms), self.name


@dataclass(frozen=True)
class Skipped:
    """A case, or a peer of one, that cannot run here."""

    name: str
    reason: str


Family = Callable[[BenchContext], Iterator[Comparison | Skipped]]
FAMILIES: Registry[Family] = Registry("benchmark")
REPEATED: set[str] = set()
"""Suites or families of cases so short that what the machine does at the time decides: they have several passes."""


def suite_names() -> list[str]:
    """The suites that have families, sorted."""
    return sorted({name.split("/")[0] for name in FAMILIES})
