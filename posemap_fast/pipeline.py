"""All stages of one scene in one process: from posed images to a map, a localizer, its error and a report.

    scene -> frame -> field -> pose branch -> view cache -> (pose-only baseline) -> APRNet -> alignment -> results

Every part reads what an earlier, interrupted call left in the run's directory and goes on from there.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posemap_fast import results
from posemap_fast.apr import APRNet, PoseFrame, build_aprnet
from posemap_fast.data import FrameEstimate, Scene, estimate_frame, load_scene
from posemap_fast.files import write_text
from posemap_fast.geometry import Camera, mean_pose, project_points
from posemap_fast.localize import PoseRegressor, SceneMap
from posemap_fast.progress import ProgressMeter
from posemap_fast.run_dir import RunDirectory
from posemap_fast.seeding import stream_seed
from posemap_fast.train import (
    AlignStage,
    APRStage,
    Checkpointer,
    FieldStage,
    LossWeights,
    MetricsLog,
    OnlineMap,
    PoseBranchStage,
    Stage,
    TrainingViews,
    ViewCache,
    ViewSampler,
    prune_occupancy,
    rendered_size,
    run_stage,
)

__all__ = ["run_pipeline"]

logger = logging.getLogger(__name__)
_MIN_VIEWS = 3  # training images that must see a cell for it to hold matter


def run_pipeline(run: RunDirectory, meter: ProgressMeter) -> dict[str, Any]:
    """Train, evaluate and report one scene; returns the summary (at once when the run is finished).

    Raises:
        PosemapError: bad input, another run's directory, a damaged file, a diverging loss.
    """
    if run.is_finished():
        return run.summary()
    config = run.identity.config
    if config.threads:
        torch.set_num_threads(config.threads)
    begin = time.monotonic()
    scene = load_scene(run.identity.scene, config.data.dataset or None, **_scene_options(run))
    run.claim(scene.fingerprint)
    handler = run.attach_log()
    try:
        logger.info("scene %s: %s; %s", scene.name, scene.counts(), scene.split_rule)
        for note in scene.notes:
            logger.info("%s", note)
        logger.info("field.backbone %s, render.backend %s", config.field.backbone, config.render.backend)
        return _Pipeline(run, scene, meter, time.monotonic() - begin).run_all()
    finally:
        logging.getLogger("posemap_fast").removeHandler(handler)
        handler.close()


def _scene_options(run: RunDirectory) -> dict[str, Any]:
    data = run.identity.config.data
    if run.identity.scene == "room":
        width = data.room_width
        return {"n_train": data.room_train, "n_test": data.room_test, "width": width, "height": width * 3 // 4}
    given = {"max_side": data.max_side, "gt": data.gt, "stride": data.stride if data.stride != 1 else 0}
    return {key: value for key, value in given.items() if value}


class _Pipeline:
    """State of one run: what the parts hand to each other."""

    def __init__(self, run: RunDirectory, scene: Scene, meter: ProgressMeter, load_seconds: float):
        self.run, self.scene, self.meter = run, scene, meter
        self.config = run.identity.config
        self.device = torch.device(self.config.device)
        self.seed = run.identity.seed
        self.log = MetricsLog(run.metrics_file)
        self.seconds: dict[str, float] = {"load": load_seconds}
        self.views = {split: self._views(split) for split in ("train", "val", "test", "unlabelled")}

    def _views(self, split: str) -> TrainingViews:
        index = torch.tensor(self.scene.views(split), dtype=torch.long)
        views = TrainingViews.of(self.scene.images.select(index), self.scene.c2w[index], self.scene.camera)
        return views.to(self.device)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def _train(self, stage: Stage) -> None:
        checkpointer = Checkpointer(self.run.checkpoint(f"{stage.name}.pt"), self.config.checkpoint_every_s)
        self.seconds[stage.name] = run_stage(stage, checkpointer, self.log, self.meter)
        logger.info("%s: %d steps in %.1f s", stage.name, stage.n_steps, self.seconds[stage.name])

    def run_all(self) -> dict[str, Any]:
        """Every stage in order, then the files of the run; summary.json is written last."""
        with self._timed("frame"):
            estimate = self._frame()
        self._drop_views(estimate.ignored_views)
        scene_map, field_stage = self._train_field(estimate)
        sampler = ViewSampler(self.config.rvs, self.views["train"].c2w, scene_map.renderer)
        self._train_pose_branch(scene_map, sampler)
        scene_map.save(self.run.map_file)
        online = self._online_map(scene_map, sampler)
        nets = self._train_networks(scene_map, online)
        with self._timed("evaluate"):
            outcome = results.evaluate(scene_map, nets, self.views, self.scene, self.meter)
        self._save_localizer(nets, outcome)
        summary = results.summarize_run(self.run, self.scene, estimate, field_stage, outcome, self.seconds)
        summary["time_s"] = self._times()
        with self._timed("report"):
            results.write_files(self.run, self.scene, scene_map, self.views, outcome, summary, self.log)
        summary["time_s"] = self._times()
        write_text(self.run.summary_file, json.dumps(results.finite(summary), indent=1) + "\n")
        return summary

    def _times(self) -> dict[str, float]:
        times = {name: round(seconds, 2) for name, seconds in self.seconds.items()}
        return times | {"total": round(sum(self.seconds.values()), 2)}

    def _frame(self) -> FrameEstimate:
        """Scene frame from the cameras and triangulated points; kept, so that a resumed run has the same one."""
        path = self.run.checkpoint("frame.pt")
        if path.exists():
            return FrameEstimate.load(path)
        estimate = estimate_frame(self.scene)
        estimate.save(path)
        self.meter.note(f"scene frame: {estimate.rule}")
        logger.info("scene frame: %s", estimate.rule)
        return estimate

    def _drop_views(self, ignored: list[int]) -> None:
        """Leave training views with absurd poses out of everything."""
        if not ignored:
            return
        names = ", ".join(self.scene.names[i] for i in ignored[:3])
        self.meter.note(f"left out {len(ignored)} training view(s) whose pose is far off: {names}")
        self.scene.splits["train"] = [i for i in self.scene.splits["train"] if i not in set(ignored)]
        self.views["train"] = self._views("train")

    def _train_field(self, estimate: FrameEstimate) -> tuple[SceneMap, FieldStage]:
        views = self.views["train"]
        scale = 1.0 if self.config.pose_scale == "metric" else "auto"
        field = self.config.field
        if field.finest_resolution == 0:
            field = dataclasses.replace(field, finest_resolution=_finest_resolution(estimate, self.scene.camera))
            logger.info("finest hash level: %d cells per side", field.finest_resolution)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.seed, "map"))
            scene_map = SceneMap.untrained(
                self.scene.name,
                field,
                self.config.render,
                estimate.frame,
                estimate.near,
                PoseFrame.from_poses(self.scene.c2w[self.scene.views("train")], scale),
                self.scene.camera,
            ).to(self.device)
        if scene_map.nerfp.appearance is not None:
            scene_map.nerfp.appearance.mean_histogram.copy_(views.histograms.mean(dim=0))
        scene_map.renderer.occupancy.restrict(lambda x: _seen(estimate, views, x))
        stage = FieldStage(self.config.nerf, scene_map.nerfp, scene_map.renderer, views, self.seed)
        self._train(stage)
        scene_map.renderer.set_coarseness(1.0)
        with self._timed("prune"):
            kept = prune_occupancy(scene_map.nerfp, scene_map.renderer, views, self.seed)
        logger.info("occupancy: kept %.0f %% of the occupied cells", 100 * kept)
        return scene_map, stage

    def _train_pose_branch(self, scene_map: SceneMap, sampler: ViewSampler) -> None:
        stage = PoseBranchStage(
            self.config.posemap,
            scene_map.nerfp,
            scene_map.decoder,
            scene_map.pose_frame,
            scene_map.renderer,
            self.scene.camera,
            sampler,
            self.seed,
        )
        self._train(stage)
        scene_map.nerfp.requires_grad_(False)

    def _online_map(self, scene_map: SceneMap, sampler: ViewSampler) -> OnlineMap:
        camera = self.scene.camera
        with self._timed("view_cache"):
            cache = ViewCache.load_or_render(
                self.run.checkpoint("views.pt"),
                scene_map.renderer,
                scene_map.nerfp,
                self.views["train"],
                rendered_size(camera.height, camera.width, self.config.apr.render_scale),
                self.meter,
            )
        norm = float(cache.posemaps.square().sum(dim=1).mean().sqrt())
        return OnlineMap(scene_map.nerfp, scene_map.renderer, sampler, cache, max(norm, 1e-6))

    def _network(self, pose_frame: PoseFrame) -> APRNet:
        camera, side = self.scene.camera, self.config.data.network_side
        config = self.config.network
        if side:
            config = dataclasses.replace(config, input_size=_network_size(camera, side))
        poses = self.scene.c2w[self.scene.views("train")]
        return build_aprnet(config, pose_frame, mean_pose(poses), seed=self.seed).to(self.device)

    def _train_networks(self, scene_map: SceneMap, online: OnlineMap) -> dict[str, APRNet]:
        """The pose-only baseline, the full method, and the aligned network."""
        views, validation = self.views["train"], self.views["val"]
        pose_only = dataclasses.replace(
            self.config.apr, weights=LossWeights(image=0.0, posemap=0.0, rvs=0.0, rvs_posemap=0.0)
        )
        nets: dict[str, APRNet] = {}
        for name, config in (("pose_only", pose_only), ("apr", self.config.apr)):
            net = self._network(scene_map.pose_frame)
            stage = APRStage(config, net, online, views, validation, self.seed, name)
            self._train(stage)
            net.load_state_dict(stage.best.state["net"])
            nets[name] = net.eval()
        nets["aligned"] = copy.deepcopy(nets["apr"])
        unlabelled = self.views["test" if self.config.protocol == "transductive" else "unlabelled"].images
        if len(unlabelled) == 0:
            self.meter.note("alignment: no unlabelled frames in this scene, the stage is left out")
            return nets
        align = AlignStage(
            self.config.align, nets["aligned"], online, unlabelled, self.scene.camera, validation, self.seed
        )
        self._train(align)
        nets["aligned"].load_state_dict(align.best.state["net"])
        nets["aligned"].eval()
        return nets

    def _save_localizer(self, nets: dict[str, APRNet], outcome: results.Outcome) -> None:
        net = nets["aligned"]
        metrics = {"sigma": outcome.sigma, "test": outcome.errors["aligned"].summary}
        PoseRegressor(net, net.config, self.scene.camera, metrics).save(self.run.localizer_file, self.scene.name)


def _network_size(camera: Camera, side: int) -> tuple[int, int]:
    """(height, width) with the longer side `side` and the camera's aspect ratio."""
    factor = side / max(camera.width, camera.height)
    return max(16, round(camera.height * factor)), max(16, round(camera.width * factor))


def _finest_resolution(estimate: FrameEstimate, camera: Camera) -> int:
    """Cells per side of the finest hash level: a cell is two thirds of a pixel at the median depth."""
    footprint = estimate.median_depth / max(camera.fx, camera.fy)  # world units per pixel
    cells = 1.5 / (footprint * estimate.frame.scale)
    return int(min(8192, max(128, 16 * round(cells / 16))))


def _seen(estimate: FrameEstimate, views: TrainingViews, x: torch.Tensor) -> torch.Tensor:
    """Whether points of the unit cube project into at least `_MIN_VIEWS` training images (with a margin of 5 %).

    What a single image sees can be explained by anything in front of it: such cells only ever hold floaters.
    """
    world = estimate.frame.to_world(x)
    camera, needed = views.camera, min(_MIN_VIEWS, len(views))
    count = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    for pose in views.c2w:
        left = torch.nonzero(count < needed).flatten()
        if left.numel() == 0:
            break
        pixels, depth = project_points(camera, pose, world[left])
        u, v = pixels[:, 0] / camera.width, pixels[:, 1] / camera.height
        count[left] += (depth > 0) & (u > -0.05) & (u < 1.05) & (v > -0.05) & (v < 1.05)
    return count >= needed
