"""All stages of one scene in one process: from posed images to a map, a localizer, its error and a report.

Every part reads what an earlier, interrupted call left in the run's directory and goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from typing import Any

import torch

from posemap_fast import results
from posemap_fast.apr import APRNet
from posemap_fast.data import Scene
from posemap_fast.errors import DatasetError
from posemap_fast.files import write_text
from posemap_fast.localize import REFINEMENT, MapRefiner, PoseRegressor, SceneMap
from posemap_fast.progress import ProgressMeter
from posemap_fast.refinement import PosedImages, RefinedScore, calibrate_refined, score_refined
from posemap_fast.run_dir import RunDirectory
from posemap_fast.stages import SceneStages, read_scene
from posemap_fast.train import LossWeights, MetricsLog, predict_poses

__all__ = ["run_pipeline"]

logger = logging.getLogger(__name__)


def run_pipeline(run: RunDirectory, meter: ProgressMeter, *, refine: bool = True) -> dict[str, Any]:
    """Train, evaluate and report one scene; returns the summary (at once when the run is finished).

    Args:
        run: where everything is kept.
        meter: shows progress.
        refine: also judge answers that the map corrects.
    Raises:
        PosemapError: bad input, another run's directory, a damaged file, a diverging loss.
    """
    if run.is_finished():
        return run.summary()
    config = run.identity.config
    if config.threads:
        torch.set_num_threads(config.threads)
    begin = time.monotonic()
    scene = read_scene(run.identity.scene, config.data)
    run.claim(scene.fingerprint)
    handler = run.attach_log()
    try:
        logger.info("scene %s: %s; %s", scene.name, scene.counts(), scene.split_rule)
        for note in scene.notes:
            logger.info("%s", note)
        logger.info("field.backbone %s, render.backend %s", config.field.backbone, config.render.backend)
        log = MetricsLog(run.metrics_file)
        stages = SceneStages(scene, config, run.identity.seed, run.checkpoint(""), log, meter)
        stages.seconds["load"] = time.monotonic() - begin
        return _run_stages(run, stages, refine)
    finally:
        logging.getLogger("posemap_fast").removeHandler(handler)
        handler.close()


def _run_stages(run: RunDirectory, stages: SceneStages, refine: bool) -> dict[str, Any]:
    """Every stage in order, then the files of the run; summary.json is written last."""
    scene, views = stages.scene, stages.views
    estimate = stages.frame()
    scene_map, field_stage = stages.field(estimate)
    sampler = stages.sampler(scene_map)
    stages.pose_branch(scene_map, sampler)
    scene_map.save(run.map_file)
    online = stages.online_map(scene_map, sampler)
    nothing = LossWeights(image=0.0, posemap=0.0, rvs=0.0, rvs_posemap=0.0)
    pose_only = dataclasses.replace(stages.config.apr, weights=nothing)
    nets = {
        name: stages.network(name, config, online, scene_map.pose_frame)
        for name, config in (("pose_only", pose_only), ("apr", stages.config.apr))
    }
    nets["aligned"] = stages.align(nets["apr"], online)
    judged = stages.cross_align(nets["apr"], online)
    unseen = stages.unseen_views(online, nets["apr"].config.input_size)
    with stages.timed("evaluate"):
        unlabelled = None if judged is None else results.JudgedFrames(judged.aligned, judged.c2w, judged.is_known)
        outcome = results.evaluate(scene_map, nets, views, scene, unseen, unlabelled, stages.meter)
    _save_localizer(run, scene, nets["aligned"], outcome)
    if refine:
        with stages.timed("refine"):
            outcome.refined = _refined(run, stages, scene_map, nets["aligned"])
    summary = results.summarize_run(run, scene, estimate, field_stage, outcome, stages.seconds)
    summary["time_s"] = _times(stages.seconds)
    with stages.timed("report"):
        results.write_files(run, scene, scene_map, views, outcome, summary, stages.log)
    summary["time_s"] = _times(stages.seconds)
    write_text(run.summary_file, json.dumps(results.finite(summary), indent=1) + "\n")
    return summary


def _refined(run: RunDirectory, stages: SceneStages, scene_map: SceneMap, net: APRNet) -> RefinedScore:
    """Answers for the test views that the map corrects, and refined.json where validation views can calibrate them."""
    refiner, scene, meter = MapRefiner(scene_map, REFINEMENT), stages.scene, stages.meter
    validation, test = (PosedImages.of(scene, split, stages.views[split].images) for split in ("val", "test"))
    start, keep = predict_poses(net, test.images), stages.checkpointer
    try:
        errors = calibrate_refined(refiner, net, validation, stages.seed, meter, keep)
    except DatasetError as error:
        scene.notes.append(f"no expected errors of refined answers: {error}")
        meter.note(scene.notes[-1])
        return score_refined(refiner, start, test, None, meter, keep)
    score = score_refined(refiner, start, test, errors, meter, keep)
    errors.save(run.refined_file, results.finite({"n_val": len(validation.images), "test": score.to_dict()}))
    return score


def _times(seconds: dict[str, float]) -> dict[str, float]:
    times = {name: round(value, 2) for name, value in seconds.items()}
    return times | {"total": round(sum(seconds.values()), 2)}


def _save_localizer(run: RunDirectory, scene: Scene, net: APRNet, outcome: results.Outcome) -> None:
    metrics = {"calibration": outcome.calibration.to_dict(), "test": outcome.errors["aligned"].summary}
    regressor = PoseRegressor(net, net.config, scene.camera, metrics, outcome.error_model)
    regressor.save(run.localizer_file, scene.name)
