"""What the rows of an ablation leave, and its summary over the seeds: of poses, and of rendered pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np

__all__ = ["PictureResult", "RowResult", "summarize_pictures", "summarize_rows"]


@dataclass(frozen=True)
class RowResult:
    """One row on one scene with one seed; errors per test view in the order of the scene's test split."""

    row: str
    scene: str
    seed: int
    t_err: list[float]  # scene units
    r_err_deg: list[float]
    far_order: list[int]  # test views, farthest from the training cameras first (`eval.outlier_order`)
    seconds: float  # of training the network
    metric: bool
    trust: Mapping[str, Mapping[str, Any]] | None = None  # t, r -> `eval.Reliability.to_dict`, where it was asked for

    @property
    def medians(self) -> tuple[float, float]:
        """Median translation and rotation error."""
        return median(self.t_err), median(self.r_err_deg)


@dataclass(frozen=True)
class PictureResult:
    """The field of one row on one scene with one seed, on the test views."""

    row: str
    scene: str
    seed: int
    psnr_db: list[float]  # per test view, in the order of the scene's test split
    ssim: list[float]
    seconds: float  # of stage 1
    samples_per_ray: float  # marched, mean over the training


_Result = TypeVar("_Result", RowResult, PictureResult)


def _by_row(results: Sequence[_Result]) -> dict[tuple[str, str], list[_Result]]:
    """Results of all seeds by scene and row; a baseline comes with every row, and one per seed is enough."""
    groups: dict[tuple[str, str], dict[int, _Result]] = {}
    for result in results:
        groups.setdefault((result.scene, result.row), {})[result.seed] = result
    return {key: list(group.values()) for key, group in groups.items()}


def summarize_rows(results: Sequence[RowResult], reference: str, outliers: float = 0.0) -> Iterator[dict[str, Any]]:
    """One summary per scene and row: medians over the seeds of the medians over the views, their spread, the ratio.

    Args:
        outliers: number of views farthest from the training cameras, or their share if below 1; 0 = none.
    Yields:
        scene, row, n_seeds, median_t, spread_t (half the range over seeds), median_r_deg, spread_r_deg, p90_t and
        p90_r_deg (median over the seeds of the 90th percentile over the views), seconds, ratio_t, ratio_r (this row's
        median over the reference's), metric; with `outliers` also outlier_t and
        outlier_r_deg, mean errors on those views (paper, table 4), and mean_t and mean_r_deg, on all views. Where the
        intervals were judged also `trust`: t, r -> inside_50, inside_90 (shares of the errors), surest and best (90th
        percentile of the error of the surest half, and of the half with the smallest errors, over that of all).
    """
    middle = {key: _over_seeds(group, outliers) for key, group in _by_row(results).items()}
    for (scene, row), values in middle.items():
        base = middle.get((scene, reference), values)
        ratios = {
            "ratio_t": values["median_t"] / max(base["median_t"], 1e-12),
            "ratio_r": values["median_r_deg"] / max(base["median_r_deg"], 1e-12),
        }
        yield {"scene": scene, "row": row, **values, **ratios}


def _over_seeds(results: Sequence[RowResult], outliers: float) -> dict[str, Any]:
    t, r = zip(*(result.medians for result in results), strict=True)
    far = {}
    if outliers:
        views = [(result, result.far_order[: _n_far(outliers, len(result.t_err))]) for result in results]
        far["outlier_t"] = median(mean(r.t_err[i] for i in index) for r, index in views)
        far["outlier_r_deg"] = median(mean(r.r_err_deg[i] for i in index) for r, index in views)
        far["mean_t"] = median(mean(result.t_err) for result in results)
        far["mean_r_deg"] = median(mean(result.r_err_deg) for result in results)
    return {
        "n_seeds": len(results),
        "median_t": median(t),
        "spread_t": (max(t) - min(t)) / 2,
        "median_r_deg": median(r),
        "spread_r_deg": (max(r) - min(r)) / 2,
        "p90_t": median(float(np.quantile(result.t_err, 0.9)) for result in results),
        "p90_r_deg": median(float(np.quantile(result.r_err_deg, 0.9)) for result in results),
        "seconds": median(result.seconds for result in results),
        "metric": results[0].metric,
        **far,
        **_trust_over_seeds([result.trust for result in results if result.trust]),
    }


def _n_far(outliers: float, n_views: int) -> int:
    return int(outliers) if outliers >= 1 else max(1, round(outliers * n_views))


def _trust_over_seeds(trusts: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    if not trusts:
        return {}
    parts = {}
    for key in ("t", "r"):
        found = [trust[key] for trust in trusts]
        parts[key] = {
            "inside_50": median(f["coverage"]["0.5"] for f in found),
            "inside_90": median(f["coverage"]["0.9"] for f in found),
            "surest": median(f["p90_surest_half"] / max(f["p90_all"], 1e-12) for f in found),
            "best": median(f["p90_best_half"] / max(f["p90_all"], 1e-12) for f in found),
        }
    return {"trust": parts}


def summarize_pictures(results: Sequence[PictureResult], reference: str) -> Iterator[dict[str, Any]]:
    """One summary per scene and row: medians over the seeds of the means over the views, and their spread.

    Yields:
        scene, row, n_seeds, psnr_db, spread_db (half the range over seeds), ssim, seconds, samples_per_ray,
        gain_db (over the reference).
    """
    middle = {key: _pictures_over_seeds(group) for key, group in _by_row(results).items()}
    for (scene, row), values in middle.items():
        base = middle.get((scene, reference), values)
        yield {"scene": scene, "row": row, **values, "gain_db": values["psnr_db"] - base["psnr_db"]}


def _pictures_over_seeds(results: Sequence[PictureResult]) -> dict[str, Any]:
    psnrs = [mean(result.psnr_db) for result in results]
    return {
        "n_seeds": len(results),
        "psnr_db": median(psnrs),
        "spread_db": (max(psnrs) - min(psnrs)) / 2,
        "ssim": median(mean(result.ssim) for result in results),
        "seconds": median(result.seconds for result in results),
        "samples_per_ray": median(result.samples_per_ray for result in results),
    }
