"""report.html: one self-contained page that says how well a run localizes and shows why.

No script, no address outside the page: pictures and plots are embedded. Sections without data are left out.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from posemap_fast.eval.metrics import RECALL_THRESHOLDS, pose_errors, psnr_db
from posemap_fast.eval.pictures import as_uint8, difference_image, jpeg_uri, pca_image, png_uri
from posemap_fast.eval.plots import error_distribution, training_curves, trajectory_plot
from posemap_fast.eval.report_data import ReportData, ViewPicture, WorstCase
from posemap_fast.eval.report_style import CSS
from posemap_fast.files import write_text
from posemap_fast.progress import format_duration

__all__ = ["write_report"]

_DASH = "-"
_ROWS = (  # summary path, label, what it is
    (("baselines", "mean_pose"), "Mean training pose", "baseline: ignores the image"),
    (("baselines", "nearest_view"), "Nearest training view", "baseline: image retrieval"),
    (("baselines", "pose_only"), "APR, pose loss only", "baseline: same network, no map"),
    (("posemap",), "PoseMap decoder", "reads the pose from the map's own PoseMap at the true pose"),
    (("apr",), "APRNet", "one image in, one pose out"),
    (("aligned",), "APRNet, aligned", "after alignment on unlabelled images"),
    (("refined",), "Corrected by the map", "its answers, moved until the map looks like the image"),
)
_N_BASELINES = 3


def write_report(path: str | Path, data: ReportData) -> None:
    """Write the page, atomically.

    Args:
        path: the HTML file.
        data: what to show; any part may be missing.
    """
    sections = (
        _header(data),
        _tiles(data),
        _section("Results", _results_table(data)),
        _section("Where the answers are", _trajectories(data)),
        _section("Held-out views", _views(data)),
        _section("Worst cases", _worst_cases(data)),
        _section("Training", _curves(data)),
        _section("Time", _times(data.summary.get("time_s") or {})),
        _section("Environment", _environment(data)),
    )
    title = html.escape(f"{data.summary.get('scene', 'scene')}: camera localization report")
    body = "\n".join(section for section in sections if section)
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>\n'
        f"<body><main>\n{body}\n</main></body></html>\n"
    )
    write_text(path, page)


def _header(data: ReportData) -> str:
    summary = data.summary
    facts = [(key, summary.get(key)) for key in ("preset", "protocol", "seed", "commit")]
    facts += [(f"{split} views", count) for split, count in data.n_views.items()]
    extent = summary.get("scene_extent_m")
    facts.append(("scene extent", None if extent is None else f"{_number(extent)} {_unit(data)}"))
    listing = "".join(
        f"<span><b>{html.escape(name)}</b> {html.escape(str(value))}</span>"
        for name, value in facts
        if value not in (None, "")
    )
    notes = "".join(f"<p class='note'>{html.escape(note)}</p>" for note in data.notes)
    if not data.is_metric:
        notes += "<p class='note'>The scene has no metric scale: translations are in the units of its poses.</p>"
    if summary.get("protocol") == "transductive":
        notes += "<p class='note'>Transductive: alignment saw the test images (not their poses).</p>"
    title = html.escape(str(summary.get("scene", "scene")))
    return f"<header><h1>{title}</h1><div class='facts'>{listing}</div>{notes}</header>"


def _tiles(data: ReportData) -> str:
    """The four numbers that most readers want."""
    nerf, apr = data.summary.get("nerf") or {}, data.summary.get("apr") or {}
    nearest = (data.summary.get("baselines") or {}).get("nearest_view") or {}
    total: Any = (data.summary.get("time_s") or {}).get("total")
    tiles = [
        ("median translation error", _number(apr.get("median_t_m")), _unit(data)),
        ("median rotation error", _number(apr.get("median_r_deg")), "deg"),
        ("nearest view's error against ours", _ratio(nearest.get("median_t_m"), apr.get("median_t_m")), "x"),
        ("held-out render quality", _number(nerf.get("psnr_db")), "dB PSNR"),
        ("total time", format_duration(total) if _is_finite(total) else _DASH, ""),
    ]
    cells = (
        f"<div class='tile'><div class='value'>{value} <small>{unit if value != _DASH else ''}</small></div>"
        f"{label}</div>"
        for label, value, unit in tiles
    )
    return f"<div class='tiles'>{''.join(cells)}</div>"


def _results_table(data: ReportData) -> str:
    unit = _unit(data)
    rows = [(_lookup(data.summary, path), label, what) for path, label, what in _ROWS]
    rows = [row for row in rows if row[0]]
    if not rows:
        return ""
    recalls = list(RECALL_THRESHOLDS) if data.is_metric else []
    head = [
        "",
        f"median t ({unit})",
        "median r (deg)",
        f"mean t ({unit})",
        "mean r (deg)",
        *map(_recall_label, recalls),
    ]
    keys = ("median_t_m", "median_r_deg", "mean_t_m", "mean_r_deg")
    body = []
    for values, label, what in rows:
        values = {**values, **{k.removeprefix("decoder_"): v for k, v in values.items()}}
        recall = values.get("recall") or {}
        cells = [_number(values.get(key)) for key in keys] + [_percent(recall.get(name)) for name in recalls]
        kind = "baseline" if "baseline" in what else "ours"
        row = "".join(f"<td class='n'>{cell}</td>" for cell in cells)
        body.append(f"<tr class='{kind}'><th>{label}<small>{what}</small></th>{row}</tr>")
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    n_test = (data.summary.get("apr") or {}).get("n_test")
    caption = f"<p class='hint'>{n_test} test views; a missing answer counts as infinitely wrong.</p>" if n_test else ""
    return f"<table class='results'><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>{caption}"


def _trajectories(data: ReportData) -> str:
    if data.gt_c2w.shape[0] == 0 or not data.predictions:
        return ""
    errors = {label: pose_errors(c2w, data.gt_c2w) for label, c2w in data.predictions.items()}
    answers = {label: (c2w, errors[label][0]) for label, c2w in data.predictions.items()}
    return (
        _plot(trajectory_plot(data.gt_c2w, answers, data.train_c2w, _unit(data)), "trajectory seen from above")
        + "<p class='hint'>Seen from above. Each coloured dot is an answer, tied to its true place by a line.</p>"
        + _plot(error_distribution(errors, _unit(data)), "share of test views below an error")
    )


def _views(data: ReportData) -> str:
    maps = _posemap_pictures(data.views)
    return "".join(_view_row(view, picture) for view, picture in zip(data.views, maps, strict=True))


def _posemap_pictures(views: Sequence[ViewPicture]) -> list[torch.Tensor | None]:
    """PCA pictures of the views that have a PoseMap; one joint PCA if the maps have one shape, as those of a run do."""
    posemaps = [view.posemap for view in views if view.posemap is not None]
    if len({tuple(posemap.shape) for posemap in posemaps}) > 1:
        return [None if view.posemap is None else pca_image(view.posemap[None])[0] for view in views]
    if not posemaps:
        return [None] * len(views)
    pictures = iter(pca_image(torch.stack([p.float().cpu() for p in posemaps])))
    return [None if view.posemap is None else next(pictures) for view in views]


def _view_row(view: ViewPicture, posemap: torch.Tensor | None) -> str:
    figures = [_figure(jpeg_uri(view.image), view.name)]
    if view.render is not None:
        quality = view.psnr_db
        if quality is None:
            quality = psnr_db(_as_float(view.render), _as_float(view.image))
        figures.append(_figure(jpeg_uri(view.render), f"render, {_number(quality)} dB"))
        figures.append(_figure(jpeg_uri(difference_image(view.image, view.render)), "difference, 4x"))
    if posemap is not None:
        figures.append(_figure(png_uri(posemap), "PoseMap (joint PCA)", "cells"))
    return f"<div class='row'>{''.join(figures)}</div>"


def _worst_cases(data: ReportData) -> str:
    return "".join(_worst_row(case, _unit(data)) for case in data.worst)


def _worst_row(case: WorstCase, unit: str) -> str:
    pictures = (
        (case.image, case.name),
        (case.render_at_truth, "render at the true pose"),
        (case.render_at_prediction, "render at the answer"),
    )
    figures = "".join(_figure(jpeg_uri(picture), text) for picture, text in pictures if picture is not None)
    errors = f"{_number(case.t_err_m)} {unit}, {_number(case.r_err_deg)} deg"
    name = "" if case.image is not None else f" ({html.escape(case.name)})"
    return f"<h3>{errors}{name}</h3><div class='row'>{figures}</div>"


def _curves(data: ReportData) -> str:
    figures = training_curves(data.metrics)
    return "".join(f"<h3>{html.escape(stage)}</h3>{_plot(uri, stage)}" for stage, uri in figures.items())


def _times(times: Mapping[str, Any]) -> str:
    stages = {name: float(value) for name, value in times.items() if name != "total" and _is_finite(value)}
    if not stages:
        return ""
    longest = max([*stages.values(), 1e-9])
    rows = [
        f"<tr><th>{html.escape(name)}</th><td class='n'>{format_duration(seconds)}</td>"
        f"<td><div class='bar' style='width:{max(0.5, 100 * seconds / longest):.1f}%'></div></td></tr>"
        for name, seconds in stages.items()
    ]
    if _is_finite(times.get("total")):
        rows.append(
            f"<tr class='ours'><th>total</th><td class='n'>{format_duration(times['total'])}</td><td></td></tr>"
        )
    return f"<table class='times'>{''.join(rows)}</table>"


def _environment(data: ReportData) -> str:
    facts = dict(data.summary.get("environment") or {})
    nerf = data.summary.get("nerf") or {}
    for key, label in (("ssim", "held-out SSIM"), ("rays_per_s", "rays/s"), ("samples_per_ray", "samples per ray")):
        if _is_finite(nerf.get(key)):
            facts[label] = _number(nerf[key])
    rows = (
        f"<tr><th>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>" for key, value in facts.items()
    )
    return f"<table class='facts-table'>{''.join(rows)}</table>" if facts else ""


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _figure(uri: str, caption: str, css_class: str = "") -> str:
    text = html.escape(caption)
    return f"<figure><img class='{css_class}' src='{uri}' alt='{text}'><figcaption>{text}</figcaption></figure>"


def _plot(uri: str, alt: str) -> str:
    return f"<img class='plot' src='{uri}' alt='{html.escape(alt)}'>"


def _unit(data: ReportData) -> str:
    return "m" if data.is_metric else "units"


def _lookup(summary: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    found: Any = summary
    for key in path:
        found = (found or {}).get(key)
    return found or {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> str:
    """Three significant digits; a dash for what is missing or undefined, infinity as such."""
    if not isinstance(value, (int, float)) or math.isnan(value):
        return _DASH
    if math.isinf(value):
        return "∞"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = 0 if value == 0 else max(0, min(4, 2 - math.floor(math.log10(abs(value)))))
        return f"{value:,.{decimals}f}"
    return f"{value:.2e}"


def _percent(value: Any) -> str:
    return f"{100 * value:.1f}" if _is_finite(value) else _DASH


def _ratio(reference: Any, value: Any) -> str:
    return _number(reference / value) if _is_finite(reference) and _is_finite(value) and value > 0 else _DASH


def _recall_label(name: str) -> str:
    metres, degrees = RECALL_THRESHOLDS[name]
    return f"% in {metres:g} m, {degrees:g}°"


def _as_float(image: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(as_uint8(image).copy()).double() / 255
