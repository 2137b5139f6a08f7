"""What a report shows; the pipeline fills it, `report.write_report` draws it. Every list may be empty."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["ReportData", "ViewPicture", "WorstCase"]


@dataclasses.dataclass(frozen=True)
class ViewPicture:
    """A held-out view beside what the map makes of it.

    Attributes:
        name: file name.
        image: (h, w, 3) uint8, or float in [0, 1].
        render: same shape, at the true pose; None if there is none.
        posemap: (C, h/16, w/16) rendered at the true pose; all views share one PCA; None if there is none.
        psnr_db: of the render; None: computed from the two pictures.
    """

    name: str
    image: torch.Tensor
    render: torch.Tensor | None = None
    posemap: torch.Tensor | None = None
    psnr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class WorstCase:
    """A test view that the localizer got most wrong; pictures (h, w, 3) uint8 or float in [0, 1], or None."""

    name: str
    t_err_m: float
    r_err_deg: float
    image: torch.Tensor | None = None
    render_at_truth: torch.Tensor | None = None
    render_at_prediction: torch.Tensor | None = None


def _no_poses() -> torch.Tensor:
    return torch.zeros(0, 4, 4, dtype=torch.float64)


@dataclasses.dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes:
        summary: the content of summary.json; a missing section or key is left out or shown as a dash.
        metrics: rows of metrics.jsonl: {"stage", "step", "name", "value", "seconds"}.
        n_views: split -> number of views.
        train_c2w: (m, 4, 4).
        gt_c2w: (n, 4, 4) true poses of the test views.
        predictions: label ("APRNet", "aligned", ...) -> (n, 4, 4); NaN is a missing answer. The first one is the
            result that the page leads with.
        views: held-out views with renders and PoseMaps.
        worst: worst first.
        is_metric: False: translations are in scene units and metric recall is not shown.
        notes: sentences to be shown under the header (what was left out, random initialisation, ...).
    """

    summary: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]] = ()
    n_views: Mapping[str, int] = dataclasses.field(default_factory=dict)
    train_c2w: torch.Tensor = dataclasses.field(default_factory=_no_poses)
    gt_c2w: torch.Tensor = dataclasses.field(default_factory=_no_poses)
    predictions: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    views: Sequence[ViewPicture] = ()
    worst: Sequence[WorstCase] = ()
    is_metric: bool = True
    notes: Sequence[str] = ()
