"""Calibrated error intervals: a network's own spread, scaled so that validation errors fall inside as often as said.

Split conformal prediction (Papadopoulos et al. 2002; Angelopoulos and Bates 2021, arXiv:2107.07511): with scores
s_i = error_i / sigma_i on n validation views, the interval [0, q sigma] with q the ceil((n + 1) level)-th smallest
score holds a new view's error with probability >= level, as long as it is drawn like the validation views.

Views of one place are alike, and a new view comes from a new place: with views in K groups, and F_k the share of the
scores of group k that are at most q, q is the smallest one with (F_1 + ... + F_K) / (K + 1) >= level (Lee, Barber and
Willett 2023, arXiv:2306.06342). With a group for each view it is the above. Scores that are known from elsewhere may
stand for further groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from posemap_fast.errors import ShapeError

__all__ = ["LEVELS", "Calibration", "KnownScores", "Reliability", "calibrate", "reliability", "widest"]

LEVELS = (0.5, 0.68, 0.9)  # shares of errors that the intervals are to hold


@dataclass(frozen=True)
class Calibration:
    """Factors on the network's sigma, by level, for translation and rotation; empty without validation views."""

    translation: Mapping[float, float]
    rotation: Mapping[float, float]
    n_views: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "t": {str(level): value for level, value in self.translation.items()},
            "r": {str(level): value for level, value in self.rotation.items()},
            "n_views": self.n_views,
        }


class KnownScores(NamedTuple):
    """What is known of errors over sigma before a view of the scene is seen."""

    scores: torch.Tensor  # (m,) of a usual place
    n_places: int  # that they count for


@dataclass(frozen=True)
class Reliability:
    """How far intervals can be trusted on views that were not used for calibration.

    Attributes:
        coverage: level -> share of errors inside their interval.
        p90_all, p90_surest: 90th percentile of the error of all views, and of the half with the smallest sigma.
        p90_best: of the half with the smallest errors, which no sigma can beat.
    """

    coverage: Mapping[float, float]
    p90_all: float
    p90_surest: float
    p90_best: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        inside = {str(level): share for level, share in self.coverage.items()}
        parts = {"p90_all": self.p90_all, "p90_surest_half": self.p90_surest, "p90_best_half": self.p90_best}
        return {"coverage": inside, **parts}


def calibrate(
    t_err: torch.Tensor,
    r_err: torch.Tensor,
    sigma: torch.Tensor,
    groups: torch.Tensor | None = None,
    known: KnownScores | None = None,
) -> Calibration:
    """Factors from validation errors.

    Args:
        t_err, r_err: (n,) errors, units as sigma's.
        sigma: (n, 2) > 0, of translation and rotation.
        groups: (n,) number of the place that each view belongs to; None: each is a place of its own.
        known: scores of further places.
    """
    _check(t_err, r_err, sigma, groups)
    place = torch.arange(len(t_err), device=t_err.device) if groups is None else groups.to(t_err.device)
    _, place, sizes = torch.unique(place, return_inverse=True, return_counts=True)
    shares = (1 / sizes.double())[place]
    n_places = len(sizes)
    scores = [t_err.double() / sigma[:, 0].double(), r_err.double() / sigma[:, 1].double()]
    if known is not None:
        scores = [torch.cat([s, known.scores.to(s)]) for s in scores]
        n_places += known.n_places
        rest = torch.full_like(known.scores.to(shares), known.n_places / len(known.scores))
        shares = torch.cat([shares, rest])
    translation, rotation = (
        {level: _quantile(s, shares, level * (n_places + 1)) for level in LEVELS if len(s)} for s in scores
    )
    return Calibration(translation, rotation, len(t_err))


def widest(*calibrations: Calibration) -> Calibration:
    """The largest factor of each level; empty calibrations have no say."""

    def largest(kinds: list[Mapping[float, float]]) -> dict[float, float]:
        return {level: max(k[level] for k in kinds if level in k) for level in LEVELS if any(level in k for k in kinds)}

    return Calibration(
        largest([c.translation for c in calibrations]),
        largest([c.rotation for c in calibrations]),
        sum(c.n_views for c in calibrations),
    )


def _quantile(scores: torch.Tensor, shares: torch.Tensor, wanted: float) -> float:
    """The smallest score up to which the shares sum up to what is wanted; the largest where they do not."""
    order = scores.argsort(stable=True)
    reached = shares[order].cumsum(dim=0) >= wanted - 1e-9
    return float(scores[order[int(reached.double().argmax()) if bool(reached.any()) else -1]])


def reliability(errors: torch.Tensor, sigma: torch.Tensor, factors: Mapping[float, float]) -> Reliability:
    """Coverage and sharpness of one kind of error, (n,) each, on views apart from those of the calibration."""
    if errors.shape != sigma.shape or errors.dim() != 1 or not len(errors):
        raise ShapeError(
            "reliability: errors and sigma must both be (n,), n >= 1; got "
            f"{tuple(errors.shape)} and {tuple(sigma.shape)}"
        )
    errors, sigma = errors.double(), sigma.double()
    coverage = {level: float((errors <= factor * sigma).double().mean()) for level, factor in factors.items()}
    half = max(1, len(sigma) // 2)
    parts = (errors, errors[sigma.argsort(stable=True)[:half]], errors.sort().values[:half])
    return Reliability(coverage, *(float(torch.quantile(part, 0.9)) for part in parts))


def _check(t_err: torch.Tensor, r_err: torch.Tensor, sigma: torch.Tensor, groups: torch.Tensor | None) -> None:
    shape = sigma.shape[:1]
    if sigma.dim() != 2 or sigma.shape[1] != 2 or t_err.shape != shape or r_err.shape != shape:
        raise ShapeError(
            f"calibrate: needs errors (n,) twice and sigma (n, 2); got {tuple(t_err.shape)}, {tuple(r_err.shape)} "
            f"and {tuple(sigma.shape)}"
        )
    if groups is not None and groups.shape != shape:
        raise ShapeError(f"calibrate: groups must be (n,), n = {len(sigma)}; got {tuple(groups.shape)}")
