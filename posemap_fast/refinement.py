"""What answers by regression plus render and compare are worth: their calibration on validation, their test errors.

    validation photographs, from the answers and from displaced true poses -> render and compare
    errors over the sigma of the alignment -> conformal factors for a new place

Pictures of random views cannot stand for photographs here: the map would be compared with itself. Validation views are
few, so each is started from two poses, which makes two errors of it (not independent ones: factors are no guarantee).
How well the map shows a place decides how good answers are there, and the views of one place share it: they are grouped
by place, clusters of their positions. Four places of one scene tell little, but the alignment's sigma has the same
meaning everywhere, so what its errors usually are counts beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.apr import APRNet
from posemap_fast.config import to_dict
from posemap_fast.data import ImageStack, Scene
from posemap_fast.errors import DatasetError
from posemap_fast.eval import KnownScores, Reliability, calibrate, pose_errors, reliability, summarize
from posemap_fast.eval.basin import displaced
from posemap_fast.eval.outliers import cluster_centres
from posemap_fast.localize import MapRefiner, RefinedAnswers, RefinedErrors
from posemap_fast.progress import ProgressMeter
from posemap_fast.seeding import step_generator
from posemap_fast.train import Checkpoint, Checkpointer, predict_poses

__all__ = ["REFINEMENT_VERSION", "Keep", "PosedImages", "RefinedScore", "calibrate_refined", "score_refined"]

Keep = Callable[[str], Checkpointer]
"""Name of a part -> what keeps its answers so far, from which a call that was interrupted goes on."""
REFINEMENT_VERSION = 2
"""Of how answers are refined and judged: kept answers, and finished rows of ablations, of another one do not count."""

_DISPLACED = 1.0  # times the network's median error on validation
_PLACES = 4  # that the validation views are split into
_LEAST_VIEWS = 8  # of validation
_INFLATION = 1.7  # of errors over the alignment's sigma, on validation views (docs/results/refinement.md)
_USUAL_PLACES = 8  # that it counts for
_CHUNK = 8  # images whose poses are moved at once; bounds the memory


@dataclass(frozen=True)
class PosedImages:
    """Photographs and their true poses."""

    name: str  # for messages
    images: ImageStack  # (n, H, W, 3) uint8, where the network is
    c2w: torch.Tensor  # (n, 4, 4) float64, on the CPU

    @classmethod
    def of(cls, scene: Scene, split: str, images: ImageStack) -> PosedImages:
        """A split, with its images where the network is."""
        return cls(f"{scene.name}, {split}", images, scene.c2w[scene.views(split)].double())


@dataclass(frozen=True)
class RefinedScore:
    """Errors on the test views, before and after the map corrected the answers."""

    c2w: torch.Tensor  # (n, 4, 4) float64, refined
    errors: torch.Tensor  # (n, 2) world units and degrees
    errors_before: torch.Tensor  # (n, 2)
    reliability: dict[str, Reliability]  # `t`, `r`; empty where no errors are expected
    ms_per_image: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "network": summarize(*self.errors_before.unbind(dim=1)),
            "refined": summarize(*self.errors.unbind(dim=1)),
            "uncertainty": {key: found.to_dict() for key, found in self.reliability.items()},
            "ms_per_image": round(self.ms_per_image, 1),
        }


def calibrate_refined(
    refiner: MapRefiner,
    net: APRNet,
    validation: PosedImages,
    seed: int,
    meter: ProgressMeter,
    keep: Keep | None = None,
) -> RefinedErrors:
    """What errors to expect of the answers of `net` when `refiner` corrects them.

    Args:
        keep: for answers so far.
    Raises:
        FileFormatError: what was kept is damaged.
        DatasetError: fewer than eight validation views.
    """
    n = len(validation.images)
    if n < _LEAST_VIEWS:
        raise DatasetError(
            f"{validation.name}: {n} view(s) are too few to tell the errors of refined answers, which needs "
            f"{_LEAST_VIEWS}; give the scene's split more of them and train again"
        )
    network = predict_poses(net, validation.images).cpu().double()
    t, r = (float(errors.median()) for errors in pose_errors(network, validation.c2w))
    rng = step_generator(seed, "refine/starts")
    starts = [network, displaced(validation.c2w, _DISPLACED * t, _DISPLACED * r, rng)]
    parts = ((start, None if keep is None else keep(f"refine_val_{k}")) for k, start in enumerate(starts))
    answers = _joined([_refine(refiner, validation.images, *part, "calibrate", meter)[0] for part in parts])
    errors = _errors(answers.c2w, validation.c2w.repeat(len(starts), 1, 1))
    place = _places(validation.c2w).repeat(len(starts))
    calibration = calibrate(errors[:, 0], errors[:, 1], answers.sigma, place, _usual_scores())
    factors = {key: values for key, values in calibration.to_dict().items() if key != "n_views"}
    return RefinedErrors(refiner.config, factors)


def _places(c2w: torch.Tensor) -> torch.Tensor:
    """Number of the cluster of positions that each pose (n, 4, 4) belongs to."""
    positions = c2w[:, :3, 3].double()
    return torch.cdist(positions, cluster_centres(positions, _PLACES)).argmin(dim=1)


def _usual_scores() -> KnownScores:
    """Lengths of three-dimensional Gaussian errors over `_INFLATION` less than their standard deviation."""
    draws = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return KnownScores(_INFLATION * draws.norm(dim=1) / 3**0.5, _USUAL_PLACES)


def _joined(parts: Sequence[RefinedAnswers]) -> RefinedAnswers:
    return RefinedAnswers(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _errors(c2w: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return torch.stack(pose_errors(c2w.double(), truth.double()), dim=1)


def _refine(
    refiner: MapRefiner,
    images: ImageStack,
    start: torch.Tensor,
    checkpointer: Checkpointer | None,
    name: str,
    meter: ProgressMeter,
) -> tuple[RefinedAnswers, float]:
    """Ends on the CPU and the seconds they took, with progress; goes on where an equal call was interrupted."""
    identity = {"version": REFINEMENT_VERSION, "config": to_dict(refiner.config)}
    found = None if checkpointer is None else checkpointer.load()
    if found is None or found.state["identity"] != identity or not torch.equal(found.state["start"], start):
        found = Checkpoint(0, 0.0, 0, {})
    parts = [RefinedAnswers(**found.state["answers"])] if found.step else []
    seconds = found.seconds
    with meter.task(name, total=len(images), start=found.step) as task:
        for first in range(found.step, len(images), _CHUNK):
            begin = time.perf_counter()
            index = torch.arange(first, min(first + _CHUNK, len(images)))
            answers = refiner.refine(images[index], start[index])
            parts.append(RefinedAnswers(*(values.cpu() for values in answers)))
            seconds += time.perf_counter() - begin
            done = int(index[-1]) + 1
            task.update(done, difference=float(answers.difference.mean()))
            if checkpointer is not None and (checkpointer.due() or done == len(images)):
                state = {"identity": identity, "start": start, "answers": _joined(parts)._asdict()}
                checkpointer.save(Checkpoint(done, seconds, 0, state))
    return _joined(parts), seconds


def score_refined(
    refiner: MapRefiner,
    start: torch.Tensor,
    test: PosedImages,
    errors: RefinedErrors | None,
    meter: ProgressMeter,
    keep: Keep | None = None,
) -> RefinedScore:
    """Errors on n >= 1 test views, and how far the expected ones can be trusted there, if there are any.

    Args:
        start: (n, 4, 4) the answers that are refined, those of a network or others.
        keep: for answers so far.
    Raises:
        FileFormatError: what was kept is damaged.
    """
    start = start.cpu().double()
    kept = None if keep is None else keep("refine_test")
    answers, seconds = _refine(refiner, test.images, start, kept, "score", meter)
    ms = 1000 * seconds / len(test.images)
    found, sigma = _errors(answers.c2w, test.c2w), answers.sigma
    factors = {} if errors is None else errors.factors
    trust = {
        key: reliability(found[:, k], sigma[:, k], {float(level): v for level, v in factors[key].items()})
        for k, key in enumerate(("t", "r"))
        if key in factors
    }
    return RefinedScore(answers.c2w.double(), found, _errors(start, test.c2w), trust, ms)
