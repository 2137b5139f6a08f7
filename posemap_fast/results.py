"""Evaluation of a trained scene and the files that tell of it: summary, trajectories, report, the printed table."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import posemap_fast
from posemap_fast import ops
from posemap_fast.apr import APRNet
from posemap_fast.data import FrameEstimate, ImageStack, Scene
from posemap_fast.environment import processor_name
from posemap_fast.eval import (
    Calibration,
    Reliability,
    ReportData,
    ViewPicture,
    WorstCase,
    calibrate,
    nearest_views,
    pose_errors,
    psnr_db,
    reliability,
    ssim,
    summarize,
    widest,
    write_report,
    write_tum,
)
from posemap_fast.geometry import mean_pose
from posemap_fast.localize import ErrorModel, SceneMap
from posemap_fast.progress import ProgressMeter
from posemap_fast.refinement import RefinedScore
from posemap_fast.render import ViewOutput, render_views
from posemap_fast.run_dir import RunDirectory
from posemap_fast.train import FieldStage, MetricsLog, Predictions, TrainingViews, predict, predict_poses

__all__ = [
    "JudgedFrames",
    "Outcome",
    "PoseErrors",
    "evaluate",
    "model_errors",
    "print_table",
    "reliability_of",
    "render_test_views",
    "shown_arguments",
    "summarize_run",
    "write_files",
]

_FOLDERS = re.compile(r"(?<![^=])(?:~|\.\.|(?=/))[^=]*/")  # of a path that begins an argument or follows a `=`

SCHEMA = 1
_PICTURES = 6  # held-out views shown in the report
_WORST = 4  # worst cases shown in the report


@dataclass
class PoseErrors:
    """Answers of one method on the test views."""

    c2w: torch.Tensor  # (n, 4, 4) predicted
    t_err_m: torch.Tensor  # (n,)
    r_err_deg: torch.Tensor  # (n,)

    @property
    def summary(self) -> dict[str, Any]:
        """Medians, means and recall."""
        return summarize(self.t_err_m, self.r_err_deg)

    @classmethod
    def of(cls, predicted: torch.Tensor, truth: torch.Tensor) -> PoseErrors:
        """Errors of predicted against true poses, (n, 4, 4) each."""
        return cls(predicted, *pose_errors(predicted, truth))


class ShownView(NamedTuple):
    """What the map shows at the true pose of a test view, on the CPU."""

    render: torch.Tensor  # (H, W, 3) uint8
    posemap: torch.Tensor  # (C, rows, cols)


class HeldOutPictures(NamedTuple):
    """What the map shows at the true poses of the test views."""

    psnr_db: list[float]  # per view
    ssim: list[float]
    vectors: torch.Tensor  # (n, 12) that the decoder reads off the PoseMaps, on the CPU
    shown: dict[int, ShownView]  # of the views that the report shows; all of them are gigabytes in a large scene


@dataclass
class Outcome:
    """Everything measured on the test split."""

    pictures: HeldOutPictures
    errors: dict[str, PoseErrors]  # decoder, pose_only, apr, aligned, mean_pose, nearest_view
    error_model: ErrorModel  # of the aligned network
    calibration: Calibration  # of its intervals
    reliability: dict[str, Reliability]  # t, r: of those intervals on the test views
    refined: RefinedScore | None = None  # answers of the aligned network that the map corrected, where asked for


def render_batch(scene_map: SceneMap, c2w: torch.Tensor, views: TrainingViews, index: int) -> ViewOutput:
    """View at one pose (4, 4) with the appearance of the image `index` of `views`."""
    codes = scene_map.nerfp.appearance_code(views.histograms[index : index + 1])
    pose = c2w[None].to(views.c2w)
    return render_views(scene_map.renderer, scene_map.nerfp, pose, scene_map.camera, appearance=codes, background=0.5)


@torch.no_grad()
def render_test_views(scene_map: SceneMap, test: TrainingViews, meter: ProgressMeter) -> HeldOutPictures:
    """Render every test view, in the light of its own image, and compare it with that image inside the border."""
    psnrs, ssims, vectors, kept, wanted = [], [], [], {}, _pictured(len(test))
    with meter.task("evaluate", total=len(test)) as task:
        for i in range(len(test)):
            view = render_batch(scene_map, test.c2w[i], test, i)
            image = test.images[i].float() / 255
            shown, truth = test.border.inside(view.rgb[0]), test.border.inside(image)
            psnrs.append(psnr_db(shown, truth))
            ssims.append(ssim(shown, truth))
            assert view.posemap is not None
            vectors.append(scene_map.decoder(view.posemap).cpu())
            if i in wanted:
                kept[i] = ShownView((view.rgb[0] * 255).round().to(torch.uint8).cpu(), view.posemap[0].cpu())
            task.update(i + 1, psnr_db=psnrs[-1])
    return HeldOutPictures(psnrs, ssims, torch.cat(vectors), kept)


def _pictured(n: int) -> list[int]:
    """Which of n test views the report shows."""
    return np.unique(np.linspace(0, n - 1, min(n, _PICTURES)).round().astype(int)).tolist()


@torch.no_grad()
def evaluate(
    scene_map: SceneMap,
    nets: dict[str, APRNet],
    views: dict[str, TrainingViews],
    scene: Scene,
    random: tuple[torch.Tensor, torch.Tensor],
    unlabelled: JudgedFrames | None,
    meter: ProgressMeter,
) -> Outcome:
    """Render every test view and let every method answer for every test image; more arguments: see `model_errors`."""
    train, test = views["train"], views["test"]
    truth = scene.c2w[scene.views("test")]
    pictures = render_test_views(scene_map, test, meter)
    decoded = scene_map.pose_frame.decode(pictures.vectors)
    train_c2w = scene.c2w[scene.views("train")]
    answers = {
        "decoder": decoded,
        **{name: predict_poses(net, test.images).cpu() for name, net in nets.items()},
        "mean_pose": mean_pose(train_c2w).expand_as(truth),
        "nearest_view": train_c2w[nearest_views(train.images, test.images).cpu()],
    }
    errors = {name: PoseErrors.of(c2w.double(), truth) for name, c2w in answers.items()}
    model, calibration = model_errors(nets["aligned"], views, random, unlabelled)
    trust = reliability_of(nets["aligned"], model, calibration, test)
    return Outcome(pictures, errors, model, calibration, trust)


class JudgedFrames(NamedTuple):
    """Answers for frames without labels; see `stages.CrossAligned`."""

    found: Predictions  # (n,) on the CPU, as the rest
    c2w: torch.Tensor  # (n, 4, 4) where the map says that they are
    is_known: torch.Tensor  # (n,) bool, of some: errors of the others count as the largest one


def model_errors(
    net: APRNet,
    views: dict[str, TrainingViews],
    random: tuple[torch.Tensor, torch.Tensor],
    unlabelled: JudgedFrames | None = None,
) -> tuple[ErrorModel, Calibration]:
    """The error model of a network, and the calibration of its intervals.

    The model is fitted on one half of the random views. Its factors are those that unlabelled frames ask for, whose
    poses the map tells: they are photographs from where the localizer will be asked. Without such frames each factor is
    the larger of that which the other random views and that which the validation views ask for: validation views lie
    near the training views and alone would promise too much elsewhere, random views are not photographs.

    Args:
        random: poses (n, 4, 4) and images (n, h, w, 3) uint8 that the network was not trained on.
        unlabelled: frames that `net`, or one like it, has not learnt.
    """
    validation = views["val"]
    found, errors = _with_errors(net, random[1], random[0])
    halves = [(Predictions(*(values[k::2] for values in found)), errors[k::2]) for k in range(2)]
    train = views["train"].c2w if net.refiner is None else views["train"].c2w[:0]
    model = ErrorModel.fit(train, net.pose_frame, *halves[0][0], halves[0][1])
    if unlabelled is not None:
        found, errors = _compared(unlabelled.found, unlabelled.c2w)
        largest = errors[unlabelled.is_known].amax(dim=0)
        return model, _calibrated(model, found, torch.where(unlabelled.is_known[:, None], errors, largest))
    return model, widest(
        _calibrated(model, *halves[1]), _calibrated(model, *_with_errors(net, validation.images, validation.c2w))
    )


def _calibrated(model: ErrorModel, found: Predictions, errors: torch.Tensor) -> Calibration:
    return calibrate(errors[:, 0], errors[:, 1], model.sigma(*found))


def _compared(found: Predictions, c2w: torch.Tensor) -> tuple[Predictions, torch.Tensor]:
    """Answers, on the CPU, and their errors (n, 2)."""
    errors = torch.stack(pose_errors(found.c2w.double(), c2w.double()), dim=1)
    return Predictions(*(values.cpu() for values in found)), errors.cpu()


def _with_errors(net: APRNet, images: ImageStack | torch.Tensor, c2w: torch.Tensor) -> tuple[Predictions, torch.Tensor]:
    """Answers for n images, on the CPU, and their errors (n, 2)."""
    return _compared(predict(net, images), c2w)


def reliability_of(
    net: APRNet, model: ErrorModel, calibration: Calibration, test: TrainingViews
) -> dict[str, Reliability]:
    """How calibrated intervals do on test views."""
    found, errors = _with_errors(net, test.images, test.c2w)
    sigma = model.sigma(*found)
    factors = (calibration.translation, calibration.rotation)
    return {key: reliability(errors[:, k], sigma[:, k], factors[k]) for k, key in enumerate(("t", "r"))}


def _medians(errors: PoseErrors) -> dict[str, float]:
    summary = errors.summary
    return {"median_t_m": summary["median_t_m"], "median_r_deg": summary["median_r_deg"]}


def summarize_run(
    run: RunDirectory,
    scene: Scene,
    estimate: FrameEstimate,
    field_stage: FieldStage,
    outcome: Outcome,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of summary.json (docs/FILES.md describes every key)."""
    identity, errors = run.identity, outcome.errors
    decoder = _medians(errors["decoder"])
    field_s = max(seconds["field"], 1e-9)
    return {
        "schema": SCHEMA,
        "scene": scene.name,
        "preset": identity.preset,
        "seed": identity.seed,
        "protocol": identity.config.protocol,
        "split": {"rule": scene.split_rule, **scene.counts()},
        "ground_truth": scene.ground_truth,
        "left_out": scene.notes,
        "unit": "m" if scene.is_metric else "scene units (not metric)",
        "nerf": {
            "psnr_db": float(np.mean(outcome.pictures.psnr_db)),
            "ssim": float(np.mean(outcome.pictures.ssim)),
            "train_s": round(seconds["field"], 2),
            "rays_per_s": round(field_stage.totals["rays"] / field_s, 1),
            "samples_per_ray": field_stage.totals["samples"] / max(1.0, field_stage.totals["rays"]),
        },
        "posemap": {
            "decoder_median_t_m": decoder["median_t_m"],
            "decoder_median_r_deg": decoder["median_r_deg"],
            "train_s": round(seconds["pose_branch"], 2),
        },
        "apr": {**errors["apr"].summary, "train_s": round(seconds["apr"], 2)},
        "aligned": errors["aligned"].summary,
        **({} if outcome.refined is None else {"refined": _refined_summary(outcome.refined)}),
        "uncertainty": {key: found.to_dict() for key, found in outcome.reliability.items()},
        "baselines": {name: _medians(errors[name]) for name in ("mean_pose", "nearest_view", "pose_only")},
        "scene_extent_m": estimate.scene_extent,
        "time_s": {},
        "environment": environment(torch.device(identity.config.device)),
        "commit": git_commit(),
    }


def _refined_summary(score: RefinedScore) -> dict[str, Any]:
    told = score.to_dict()
    return {**told["refined"], "uncertainty": told["uncertainty"], "ms_per_image": told["ms_per_image"]}


def write_files(
    run: RunDirectory,
    scene: Scene,
    scene_map: SceneMap,
    views: dict[str, TrainingViews],
    outcome: Outcome,
    summary: dict[str, Any],
    log: MetricsLog,
) -> None:
    """Trajectories (TUM, in the order of the test names) and report.html."""
    index = scene.views("test")
    order = sorted(range(len(index)), key=lambda i: scene.names[index[i]])
    truth = scene.c2w[index]
    answers = {
        "APR + PoseMap": outcome.errors["apr"].c2w,
        "aligned": outcome.errors["aligned"].c2w,
        "pose loss only": outcome.errors["pose_only"].c2w,
    }
    write_tum(run.root / "poses_test.txt", answers["aligned"][order])
    write_tum(run.root / "poses_test_gt.txt", truth[order])
    if outcome.refined is not None:
        answers["corrected by the map"] = outcome.refined.c2w
        write_tum(run.root / "poses_test_refined.txt", outcome.refined.c2w[order])
    data = ReportData(
        summary=summary,
        metrics=log.rows(),
        n_views=scene.counts(),
        train_c2w=scene.c2w[scene.views("train")],
        gt_c2w=truth,
        predictions=answers,
        views=_pictures(scene, views["test"], outcome),
        worst=_worst_cases(scene, scene_map, views["test"], outcome),
        is_metric=scene.is_metric,
        notes=[scene.split_rule, *scene.notes],
    )
    write_report(run.report_file, data)


def _pictures(scene: Scene, test: TrainingViews, outcome: Outcome) -> list[ViewPicture]:
    found = outcome.pictures
    return [
        ViewPicture(scene.names[scene.views("test")[i]], test.images[i], shown.render, shown.posemap, found.psnr_db[i])
        for i, shown in found.shown.items()
    ]


def _worst_cases(scene: Scene, scene_map: SceneMap, test: TrainingViews, outcome: Outcome) -> list[WorstCase]:
    """The views with the largest error relative to the medians, with renders at the true and at the answered pose."""
    errors = outcome.errors["apr"]
    badness = errors.t_err_m / errors.t_err_m.median().clamp(min=1e-9)
    badness = badness + errors.r_err_deg / errors.r_err_deg.median().clamp(min=1e-9)
    cases = []
    for i in badness.argsort(descending=True)[:_WORST].tolist():
        true, answered = (render_batch(scene_map, c2w, test, i).rgb[0] for c2w in (test.c2w[i], errors.c2w[i]))
        cases.append(
            WorstCase(
                scene.names[scene.views("test")[i]],
                float(errors.t_err_m[i]),
                float(errors.r_err_deg[i]),
                test.images[i],
                true,
                answered,
            )
        )
    return cases


def finite(value: Any) -> Any:
    """The same nested values with NaN and infinity as None: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions that a figure depends on, which was found on `device`."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "posemap_fast": posemap_fast.__version__,
        "kernels": ops.backend_name(device.type),
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "cuda": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def git_commit() -> str:
    """Commit of the checkout that runs, with `-dirty` when it has local changes; empty outside a checkout."""
    root = Path(posemap_fast.__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return result.stdout.strip()


def shown_arguments() -> list[str]:
    """The command line behind the program's name, without the folders of this machine: for what gets published."""
    return [_FOLDERS.sub("", argument) for argument in sys.argv[1:]]


def print_table(summary: dict[str, Any], console: Console) -> None:
    """The one table that a run ends with."""
    is_metric = summary["unit"] == "m"
    unit = "m" if is_metric else "units"
    title = f"{summary['scene']} · preset {summary['preset']} · seed {summary['seed']} · {summary['protocol']}"
    table = Table(title=title)
    recalls = {"5cm/5deg": "0.05m_5deg", "0.25m/2deg": "0.25m_2deg", "0.5m/5deg": "0.5m_5deg"} if is_metric else {}
    for column in ("method", f"median t ({unit})", "median r (deg)", *recalls):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = [
        ("mean training pose", summary["baselines"]["mean_pose"]),
        ("nearest training view", summary["baselines"]["nearest_view"]),
        ("APR, pose loss only", summary["baselines"]["pose_only"]),
        ("APR + PoseMap", summary["apr"]),
        ("  + alignment", summary["aligned"]),
        *([("  + render and compare", summary["refined"])] if "refined" in summary else []),
    ]
    for name, row in rows:
        recall = row.get("recall", {})
        shares = [f"{100 * recall[k]:.0f} %" if k in recall else "" for k in recalls.values()]
        table.add_row(name, f"{row['median_t_m']:.3f}", f"{row['median_r_deg']:.2f}", *shares)
    console.print(table)
    nerf, posemap = summary["nerf"], summary["posemap"]
    console.print(
        f"field: PSNR {nerf['psnr_db']:.2f} dB, SSIM {nerf['ssim']:.3f}, trained in {nerf['train_s']:.0f} s "
        f"({nerf['rays_per_s']:.0f} rays/s) · PoseMap decoder: {posemap['decoder_median_t_m']:.3f} {unit}, "
        f"{posemap['decoder_median_r_deg']:.2f} deg · total {summary['time_s']['total']:.0f} s"
    )
    if "refined" in summary:
        per_image = summary["refined"]["ms_per_image"]
        console.print(f"render and compare (posemap localize --refine): {per_image:.0f} ms per image, eight at a time")
