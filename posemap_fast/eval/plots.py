"""Plots of the report, drawn without a display and embedded as SVG.

Figures are made with matplotlib's object interface (no pyplot): no global figure list, no backend choice, and the
same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

__all__ = ["error_distribution", "svg_uri", "top_down_axes", "training_curves", "trajectory_plot"]

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8eb",
    "axes.edgecolor": "#8a9099",
    "axes.titlesize": 9,
    "svg.hashsalt": "posemap_fast",
    "legend.frameon": False,
}
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
_MAX_POINTS = 400  # per curve; more would only make the page heavy
_PANEL_WIDTH = 4.4  # inches
_LOG_RANGE = 8.0  # a positive curve that spans more than this factor is drawn on a log axis


def training_curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """One figure per stage, one small plot per logged number.

    Args:
        rows: the rows of metrics.jsonl: {"stage", "step", "name", "value", "seconds"}.
    Returns:
        Stage -> `data:` address of its SVG, in the order of first appearance.
    """
    stages: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["value"] is None or not math.isfinite(row["value"]):
            continue
        curves = stages.setdefault(str(row["stage"]), {})
        curves.setdefault(str(row["name"]), []).append((float(row["step"]), float(row["value"])))
    return {stage: _curves_of_stage(curves) for stage, curves in stages.items()}


def _curves_of_stage(curves: Mapping[str, list[tuple[float, float]]]) -> str:
    n_columns = min(3, len(curves))
    n_rows = -(-len(curves) // n_columns)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.4 * n_columns, 2.2 * n_rows), layout="constrained")
        for i, (name, points) in enumerate(curves.items()):
            _draw_curve(figure.add_subplot(n_rows, n_columns, i + 1), name, np.array(points))
        return svg_uri(figure)


def _draw_curve(axes: Axes, name: str, points: np.ndarray) -> None:
    """The raw curve pale, its bin means on top."""
    steps, values = points.T
    axes.set_title(name)
    axes.set_xlabel("step")
    if values.min() > 0 and values.max() > _LOG_RANGE * values.min():
        axes.set_yscale("log")
    if len(steps) < 3:
        axes.plot(steps, values, "o", color=_COLOURS[0], markersize=4)
        return
    axes.plot(*_bin_means(steps, values, _MAX_POINTS), color=_COLOURS[0], alpha=0.3, linewidth=0.8)
    axes.plot(*_bin_means(steps, values, min(60, len(steps))), color=_COLOURS[0], linewidth=1.5)


def _bin_means(steps: np.ndarray, values: np.ndarray, n_bins: int) -> tuple[np.ndarray, np.ndarray]:
    groups = np.array_split(np.arange(len(steps)), min(n_bins, len(steps)))
    return np.array([steps[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def error_distribution(errors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], unit: str = "m") -> str:
    """Share of test views below an error, for translation and rotation.

    Args:
        errors: label -> (t_err (n,), r_err_deg (n,)); infinite errors keep the curve below 1.
        unit: unit of t_err.
    Returns:
        `data:` address of the SVG.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        labels = (f"translation error ({unit})", "rotation error (deg)")
        for k, axes in enumerate(figure.subplots(1, 2)):
            for colour, (label, pair) in zip(_COLOURS, errors.items(), strict=False):
                ordered = np.sort(pair[k].double().numpy())
                share = np.arange(1, len(ordered) + 1) / max(len(ordered), 1)
                is_shown = np.isfinite(ordered) & (ordered > 0)
                axes.step(ordered[is_shown], share[is_shown], where="post", label=label, color=colour)
            axes.set(xlabel=labels[k], ylabel="share of test views", ylim=(0, 1.02))
            if axes.lines and any(len(line.get_xdata()) for line in axes.lines):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.legend(loc="lower right")
        return svg_uri(figure)


def top_down_axes(c2w: torch.Tensor) -> torch.Tensor:
    """Two world directions spanning the floor, (2, 3): the wider extent of the cameras to the right.

    "Up" is the mean of the cameras' up directions (minus y in OpenCV axes), so the world frame may have any
    orientation. Cameras that look all ways, with no common up, fall back to the plane of their centres.
    """
    poses = c2w.double().cpu()
    centres = poses[:, :3, 3] - poses[:, :3, 3].mean(dim=0)
    up = -poses[:, :3, 1].mean(dim=0)
    if float(up.norm()) > 0.1:
        up = up / up.norm()
        centres = centres - (centres @ up)[:, None] * up
        first = torch.linalg.eigh(centres.T @ centres + 1e-12 * torch.eye(3).double()).eigenvectors[:, 2]
        first = first - (first @ up) * up
        if float(first.norm()) < 1e-6:  # all cameras in one place: any horizontal direction
            first = torch.linalg.cross(up, torch.eye(3).double()[int(up.abs().argmin())])
        first = first / first.norm()
        return torch.stack([first, torch.linalg.cross(up, first)])
    return torch.linalg.eigh(centres.T @ centres).eigenvectors.T[[2, 1]]


def trajectory_plot(
    gt_c2w: torch.Tensor,
    predictions: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    train_c2w: torch.Tensor,
    unit: str = "m",
) -> str:
    """Seen from above: training cameras, true test cameras, and each prediction tied to its truth by a line.

    Args:
        gt_c2w: (n, 4, 4) true test poses, n >= 1.
        predictions: label -> (c2w (n, 4, 4), t_err (n,)); one panel each; colour is the error, missing answers are
            crosses on the truth.
        train_c2w: (m, 4, 4), m >= 0.
        unit: unit of the poses.
    Returns:
        `data:` address of the SVG.
    """
    floor = top_down_axes(torch.cat([train_c2w.double().cpu(), gt_c2w.double().cpu()]))
    train, truth = ((c2w[:, :3, 3].double().cpu() @ floor.T).numpy() for c2w in (train_c2w, gt_c2w))
    limit = _colour_limit([t_err for _, t_err in predictions.values()])
    with matplotlib.rc_context(_STYLE):
        panel_height = _panel_height(np.concatenate([train, truth]))
        figure = Figure(figsize=(_PANEL_WIDTH * len(predictions) + 0.8, panel_height + 1.2), layout="constrained")
        panels = np.atleast_1d(np.array(figure.subplots(1, max(1, len(predictions)), sharex=True, sharey=True)))
        dots = None
        for axes, (label, (c2w, t_err)) in zip(panels, predictions.items(), strict=True):
            answer = (c2w[:, :3, 3].double().cpu() @ floor.T).numpy()
            dots = _draw_trajectory(axes, train, truth, answer, t_err.double().cpu().numpy(), limit)
            axes.set(title=label, xlabel=unit, aspect="equal")
        panels[0].set_ylabel(unit)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
        if dots is not None:
            figure.colorbar(dots, ax=list(panels), label=f"translation error ({unit})", extend="max", shrink=0.8)
        return svg_uri(figure)


def _panel_height(points: np.ndarray) -> float:
    """Inches that keep the aspect of the floor plan without empty bands, within reason."""
    width, height = np.maximum(np.ptp(points, axis=0), 1e-9)
    return float(np.clip(_PANEL_WIDTH * height / width, 1.6, 5.0))


def _draw_trajectory(
    axes: Axes, train: np.ndarray, truth: np.ndarray, answer: np.ndarray, t_err: np.ndarray, limit: float
) -> Any:
    axes.plot(*train.T, ".", color="#c9ced6", markersize=3, label="training cameras", zorder=1)
    axes.plot(*truth.T, "o", color="#111827", markersize=2.5, label="truth", zorder=2)
    is_answered = np.isfinite(t_err)
    if (~is_answered).any():
        axes.plot(*truth[~is_answered].T, "x", color="#dc2626", markersize=6, label="no answer", zorder=4)
    truth, answer, t_err = truth[is_answered], answer[is_answered], t_err[is_answered]
    gap = np.full(len(truth), np.nan)
    ties = (np.stack([truth[:, k], answer[:, k], gap], axis=1).ravel() for k in range(2))
    axes.plot(*ties, color="#9ca3af", linewidth=0.6, zorder=2)
    return axes.scatter(
        answer[:, 0],
        answer[:, 1],
        c=t_err,
        s=14,
        cmap="plasma_r",
        vmin=0,
        vmax=limit,
        label="prediction (colour: error)",
        zorder=3,
    )


def _colour_limit(errors: Sequence[torch.Tensor]) -> float:
    """90th percentile of the finite errors, so that one outlier does not make all others look alike."""
    finite = torch.cat([e.double().cpu()[torch.isfinite(e.cpu())] for e in errors]) if errors else torch.zeros(0)
    return max(float(np.quantile(finite.numpy(), 0.9)), 1e-9) if finite.numel() else 1.0


def svg_uri(figure: Figure) -> str:
    """The figure as a `data:` address; no date inside, so that equal figures are equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
