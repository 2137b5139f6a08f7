"""The training stages of one scene, in order, each resumed from its checkpoint: what a run and an ablation are made of.

scene -> frame -> field -> pose branch -> view cache -> networks -> alignment
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from posemap_fast.apr import APRConfig, APRNet, PoseFrame, PoseMapReadout, build_aprnet
from posemap_fast.data import FrameEstimate, ImageStack, Scene, estimate_frame, find_border, load_scene
from posemap_fast.experiment import DataConfig, ExperimentConfig
from posemap_fast.geometry import Camera, mean_pose, project_points
from posemap_fast.localize import SceneMap, usual_difference
from posemap_fast.progress import ProgressMeter
from posemap_fast.seeding import stream_seed
from posemap_fast.train import (
    AlignStage,
    APRStage,
    APRTrainConfig,
    Checkpointer,
    DistilAlignStage,
    FieldStage,
    MetricsLog,
    OnlineMap,
    PoseBranchStage,
    Predictions,
    RandomViewSource,
    Stage,
    TrainingViews,
    ViewCache,
    ViewSampler,
    predict,
    prune_occupancy,
    rendered_size,
    run_stage,
)

__all__ = ["CrossAligned", "SceneStages", "read_scene"]

logger = logging.getLogger(__name__)
_UNSEEN_BATCH, _UNSEEN_BATCHES = 4, 48  # random views for the error model
_UNSEEN_RANGE = 1.2  # relative to random view synthesis; they come from all distances up to it
_LEAST_UNLABELLED = 9  # frames to judge answers by: fewer cannot tell what 90 % of errors stay below
_MIN_VIEWS = 3  # training images that must see a cell for it to hold matter


def read_scene(scene: str, data: DataConfig) -> Scene:
    """The scene `room`, or a capture on disk, as the configuration wants it.

    Raises:
        DatasetError: the scene cannot be read.
    """
    if scene == "room":
        width = data.room_width
        size = {"width": width, "height": width * 3 // 4}
        found = load_scene(scene, None, n_train=data.room_train, n_test=data.room_test, **size)
    else:
        given = {"max_side": data.max_side, "gt": data.gt, "stride": data.stride if data.stride != 1 else 0}
        found = load_scene(scene, data.dataset or None, **{key: value for key, value in given.items() if value})
    if data.unlabelled_every > 0:
        _take_unlabelled(found, data.unlabelled_every)
    return found


def _take_unlabelled(scene: Scene, every: int) -> None:
    """Move every n-th test view to the unlabelled ones: they are aligned on and never scored."""
    test = scene.splits["test"]
    taken = set(test[every // 2 :: every])
    scene.splits["test"] = [i for i in test if i not in taken]
    scene.splits["unlabelled"] = sorted({*scene.splits.get("unlabelled", []), *taken})
    scene.notes.append(f"every {every}th test view is unlabelled: {len(taken)} are aligned on and not scored")


class CrossAligned(NamedTuple):
    """Answers for unlabelled frames by networks that have not learnt them, and where the map says that these are."""

    before: Predictions  # (n,) of the network before alignment
    aligned: Predictions  # (n,) of networks aligned on the other half of the frames
    c2w: torch.Tensor  # (n, 4, 4) camera-to-world, world frame
    is_known: torch.Tensor  # (n,) bool: the map came to look like the frame from there


class SceneStages:
    """Trains the parts of one scene; every stage goes on from its file in `folder`.

    Args:
        scene: images, poses and splits; views with absurd poses are removed from its training split.
        config: of the whole experiment.
        seed: all randomness follows from it.
        folder: of the checkpoints.
        log: receives the stages' numbers.
        meter: shows progress.
    Attributes:
        views: split -> its views, on the configured device.
        seconds: part -> seconds spent, over all calls.
    """

    def __init__(
        self, scene: Scene, config: ExperimentConfig, seed: int, folder: Path, log: MetricsLog, meter: ProgressMeter
    ):
        self.scene, self.config, self.seed = scene, config, seed
        self.folder, self.log, self.meter = folder, log, meter
        self.device = torch.device(config.device)
        self.seconds: dict[str, float] = {}
        self.border = find_border(scene.images.select(torch.tensor(scene.views("train"), dtype=torch.long)))
        if any(self.border):
            sides = ", ".join(f"{side} {width}" for side, width in self.border._asdict().items() if width)
            scene.notes.append(f"the images have a dark frame ({sides} px), neither learnt by the map nor in its PSNR")
            meter.note(scene.notes[-1])
        self.views = {split: self._views(split) for split in ("train", "val", "test", "unlabelled")}

    def _views(self, split: str) -> TrainingViews:
        index = torch.tensor(self.scene.views(split), dtype=torch.long)
        images = self.scene.images.select(index)
        views = TrainingViews.of(images, self.scene.c2w[index], self.scene.camera, self.border)
        return views.to(self.device)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin

    def checkpointer(self, name: str) -> Checkpointer:
        """Of a stage, or of another part that takes long."""
        return Checkpointer(self.folder / f"{name}.pt", self.config.checkpoint_every_s)

    def _train(self, stage: Stage) -> None:
        self.seconds[stage.name] = run_stage(stage, self.checkpointer(stage.name), self.log, self.meter)
        logger.info("%s: %d steps in %.1f s", stage.name, stage.n_steps, self.seconds[stage.name])

    def frame(self) -> FrameEstimate:
        """Scene frame from the cameras and triangulated points; kept, so that a resumed run has the same one."""
        path = self.folder / "frame.pt"
        with self.timed("frame"):
            if path.exists():
                estimate = FrameEstimate.load(path)
            else:
                estimate = estimate_frame(self.scene)
                estimate.save(path)
                self.meter.note(f"scene frame: {estimate.rule}")
                logger.info("scene frame: %s", estimate.rule)
        self._drop_views(estimate.ignored_views)
        return estimate

    def _drop_views(self, ignored: list[int]) -> None:
        """Leave training views with absurd poses out of everything."""
        if not ignored:
            return
        names = ", ".join(self.scene.names[i] for i in ignored[:3])
        self.meter.note(f"left out {len(ignored)} training view(s) whose pose is far off: {names}")
        self.scene.splits["train"] = [i for i in self.scene.splits["train"] if i not in set(ignored)]
        self.views["train"] = self._views("train")

    def field(self, estimate: FrameEstimate) -> tuple[SceneMap, FieldStage]:
        """Stage 1: colour and density, and the occupancy grid that later stages march through."""
        scene_map, stage = self.new_field(estimate)
        self.train_field(scene_map, stage)
        return scene_map, stage

    def new_field(self, estimate: FrameEstimate) -> tuple[SceneMap, FieldStage]:
        """An untrained map and its stage 1."""
        views = self.views["train"]
        scale = 1.0 if self.config.pose_scale == "metric" else "auto"
        field = self.config.field
        if field.finest_resolution == 0:
            field = dataclasses.replace(field, finest_resolution=_finest_resolution(estimate, self.scene.camera))
            logger.info("finest hash level: %d cells per side", field.finest_resolution)
        if field.pose_octaves == 0:  # an octave of the inner box, which each cascade makes a half of the cube
            field = dataclasses.replace(field, pose_octaves=1 + estimate.frame.n_cascades)
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
        return scene_map, FieldStage(self.config.nerf, scene_map.nerfp, scene_map.renderer, views, self.seed)

    def train_field(self, scene_map: SceneMap, stage: FieldStage) -> None:
        """Train the map of `new_field`, and empty the cells that no training view sees."""
        self._train(stage)
        scene_map.renderer.set_coarseness(1.0)
        with self.timed("prune"):
            kept = prune_occupancy(scene_map.nerfp, scene_map.renderer, self.views["train"], self.seed)
        logger.info("occupancy: kept %.0f %% of the occupied cells", 100 * kept)

    def pose_branch(self, scene_map: SceneMap, sampler: ViewSampler) -> None:
        """Stage 2: the pose branch and its decoder; the map is frozen afterwards."""
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
        with self.timed("usual_difference"):
            train = self.views["train"]
            scene_map.usual_difference = usual_difference(scene_map, train.images, train.c2w)

    def online_map(self, scene_map: SceneMap, sampler: ViewSampler) -> OnlineMap:
        """The frozen map with its renders and PoseMaps at the training poses."""
        size = rendered_size(self.scene.camera, self.config.apr.render_scale, self._network_config().input_size)
        with self.timed("view_cache"):
            cache = ViewCache.load_or_render(
                self.folder / "views.pt",
                scene_map.renderer,
                scene_map.nerfp,
                self.views["train"],
                size,
                self.meter,
            )
        online = OnlineMap(scene_map.nerfp, scene_map.renderer, sampler, cache, max(cache.feature_scale, 1e-6))
        self._fit_readout(online, scene_map.pose_frame)
        return online

    def _fit_readout(self, online: OnlineMap, pose_frame: PoseFrame) -> None:
        """Once for all networks on a map that predict PoseMaps."""
        if online.readout is not None or self.config.network.pose_from != "posemap":
            return
        with self.timed("readout"):
            cache = online.cache
            points = pose_frame.encode_points(cache.points)
            online.readout = PoseMapReadout.fit(cache.posemaps, points, cache.opacity, self.seed)

    def sampler(self, scene_map: SceneMap) -> ViewSampler:
        """Source of random poses around the training poses."""
        return ViewSampler(self.config.rvs, self.views["train"].c2w, scene_map.renderer)

    def network(self, name: str, config: APRTrainConfig, online: OnlineMap, pose_frame: PoseFrame) -> APRNet:
        """Stage 3: a network trained with `config`, in the state chosen on validation; `name` is the stage's."""
        net = self._new_network(online, pose_frame)
        stage = APRStage(config, net, online, self.views["train"], self.views["val"], self.seed, name)
        self._train(stage)
        self.seconds[name] += stage.seconds_saved  # as if it had been trained alone
        net.load_state_dict(stage.best.state["net"])
        return net.eval()

    def _network_config(self) -> APRConfig:
        """With the input size that `data.network_side` gives at the camera's aspect ratio."""
        side = self.config.data.network_side
        if not side:
            return self.config.network
        return dataclasses.replace(self.config.network, input_size=_network_size(self.scene.camera, side))

    def _new_network(self, online: OnlineMap, pose_frame: PoseFrame) -> APRNet:
        poses, cache, camera = self.scene.c2w[self.scene.views("train")], online.cache, self.scene.camera
        channels, rows, cols = cache.posemaps.shape[1:]
        config = dataclasses.replace(self._network_config(), posemap_channels=channels, posemap_cells=(rows, cols))
        net = build_aprnet(config, pose_frame, mean_pose(poses), seed=self.seed, camera=camera).to(self.device)
        if net.refiner is not None:
            self._fit_readout(online, pose_frame)
            assert online.readout is not None
            net.refiner.readout.load_state_dict(online.readout.state_dict())
        return net

    def unseen_views(self, online: OnlineMap, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses (n, 4, 4) and images (n, height, width, 3) uint8 of random views that no network was trained on.

        From beside the training poses to a little beyond the range of random view synthesis, in that order.
        """
        codes = online.nerfp.appearance_code(self.views["train"].histograms)
        source = RandomViewSource(
            online.nerfp,
            online.renderer,
            online.sampler,
            self.scene.camera,
            codes,
            image_size=size,
            n_views=_UNSEEN_BATCH,
            appearance=self.config.rvs.appearance,
            seed=stream_seed(self.seed, "unseen views"),
        )
        with self.timed("unseen_views"), self.meter.task("unseen views", total=_UNSEEN_BATCHES) as task:
            drawn = []
            for k in range(_UNSEEN_BATCHES):
                drawn.append(source.draw(k, _UNSEEN_RANGE * (k + 1) / _UNSEEN_BATCHES))
                task.update(k + 1)
        poses, images = zip(*drawn, strict=True)
        return torch.cat(poses), torch.cat(images)

    def align(self, net: APRNet, online: OnlineMap) -> APRNet:
        """Stage 4: a copy of `net` aligned on unlabelled images; an equal copy where the scene has none."""
        images = self._unlabelled().images
        if len(images) == 0:
            self.meter.note("alignment: no unlabelled frames in this scene, the stage is left out")
            return copy.deepcopy(net)
        return self._aligned(self._align_stage(net, online, images, "align", self.config.align.share))

    def cross_align(self, net: APRNet, online: OnlineMap) -> CrossAligned | None:
        """How copies of `net` do on unlabelled frames that they were not aligned on: each half judged by the other.

        These are photographs from where the localizer will be asked, which validation views, beside the training
        views, and random views are not. Their poses are those that render and compare finds, which are several times
        as exact as the network; no true pose is read. Halves are every other frame: where frames follow each other
        closely, both have seen the same places.

        Returns:
            None where there are too few such frames, where they are the test frames (`transductive`), whose errors
            are not to decide what they are judged by, or where alignment does not find their poses (`paper`).
        """
        config, images = self.config.align, self.views["unlabelled"].images
        share = min(1.0, 2 * config.share)  # of a half: as many frames as the localizer learns
        if (
            share * len(images) < _LEAST_UNLABELLED
            or self.config.protocol == "transductive"
            or config.method == "paper"
        ):
            return None
        halves = [self._align_stage(net, online, images[k::2], f"align_half_{k}", share) for k in range(2)]
        nets = [self._aligned(stage) for stage in halves]
        before, aligned, poses, known = [], [], [], []
        for stage, other in zip(halves, nets[::-1], strict=True):
            assert isinstance(stage, DistilAlignStage)
            before.append(predict(net, stage.images))
            aligned.append(predict(other, stage.images))
            poses.append(stage.poses)
            known.append(torch.zeros(len(stage.poses), dtype=torch.bool).index_fill_(0, stage.trusted().cpu(), True))
        if int(torch.cat(known).sum()) < _LEAST_UNLABELLED:
            return None
        return CrossAligned(_joined(before), _joined(aligned), torch.cat(poses).cpu(), torch.cat(known))

    def _unlabelled(self) -> TrainingViews:
        return self.views["test" if self.config.protocol == "transductive" else "unlabelled"]

    def _align_stage(
        self, net: APRNet, online: OnlineMap, images: ImageStack, name: str, share: float
    ) -> AlignStage | DistilAlignStage:
        """Alignment of a copy of `net`, which is the stage's, on a share of the images."""
        config = dataclasses.replace(self.config.align, share=share)
        common = (config, copy.deepcopy(net), online, images, self.scene.camera, self.views["val"], self.seed)
        if config.method == "paper":
            return AlignStage(*common)
        return DistilAlignStage(*common, self.views["train"], name)

    def _aligned(self, stage: AlignStage | DistilAlignStage) -> APRNet:
        self._train(stage)
        stage.net.load_state_dict(stage.best.state["net"])
        return stage.net.eval()


def _joined(parts: list[Predictions]) -> Predictions:
    return Predictions(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


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
