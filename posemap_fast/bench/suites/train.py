"""Training steps at the sizes of the preset `cpu` on the scene `room`: field, pose branch, online loop.

A timed step is one of training with the learning rate 0: all of the work, and the weights stay as they are, so that
every run and every peer does the same. `plain torch` is the same step on `ops.reference`, which is also what results
are judged by. The map of stages 2 and 3 is not trained as the preset does, but from near the room's surfaces
(`bench.surfaces`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from posemap_fast import ops
from posemap_fast.apr import APRNet
from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison
from posemap_fast.bench.machine import yardstick
from posemap_fast.bench.surfaces import SHORT, start_near_surfaces
from posemap_fast.bench.verify import Tensors, relative_error
from posemap_fast.eval import psnr_db
from posemap_fast.experiment import load_experiment
from posemap_fast.localize import SceneMap
from posemap_fast.losses import pose_l2
from posemap_fast.progress import NoProgress
from posemap_fast.render import render_posemaps, render_views
from posemap_fast.seeding import step_generator
from posemap_fast.stages import SceneStages, read_scene
from posemap_fast.train import (
    APRStage,
    APRTrainConfig,
    FieldStage,
    MetricsLog,
    OnlineMap,
    PoseBranchStage,
    Stage,
    TrainingViews,
)
from posemap_fast.train.selection import network_input

__all__ = ["PEERS", "Peer"]

_PLAIN = "plain torch"
_SEED = 0
# Kernels and reference round differently, and a sample at the edge of what a ray sees is kept by one and dropped by the
# other: it has a thousandth of the light. A GPU computes the field's networks in half precision.
_TOLERANCE = {"cpu": 1e-3, "cuda": 5e-2}
# A ReLU at its kink lets a gradient through or not, as the convolution before it rounds.
_NETWORK_TOLERANCE = 1e-2
_SHORT = (
    *("data.room_test=2", "posemap.steps=20", "apr.steps=10", "checkpoint_every_s=1e9"),
    *("field.backbone=native", "render.backend=native"),
)
_FEW_VIEWS = ("data.room_train=60",)  # for stages 2 and 3, whose steps cost the same however many there are
_SMALL_ROOM = "train/room of few views"  # their map, from near the surfaces, which the first of them trains
_SMOKE = (
    *("data.room_train=12", "data.room_width=32", "data.network_side=0", "network.input_size=[24,32]"),
    *("field.log2_hashmap_size=10", "field.n_levels=4", "render.steps_per_unit=48", "render.occupancy.resolution=16"),
    *("nerf.steps=50", "nerf.samples_per_step=1024", "posemap.steps=3", "posemap.batch=2"),
    *("apr.batch=2", "apr.rvs_batch=2", "apr.replay_batch=4"),
)


@dataclass(frozen=True)
class _Scene:
    """The scene `room`, and the stages that make something of it."""

    stages: SceneStages
    folder: Path
    tolerance: float  # of results of our kernels

    @classmethod
    def of(cls, context: BenchContext, folder: Path, *overrides: str) -> _Scene:
        """At the preset's sizes but for `overrides`; tiny in a smoke run."""
        smoke = _SMOKE if context.is_smoke else ()
        config = load_experiment("cpu", overrides=[*_SHORT, *overrides, *smoke, f"device={context.device}"])
        scene = read_scene("room", config.data)
        log = MetricsLog(folder / "metrics.jsonl")
        stages = SceneStages(scene, config, _SEED, folder / "checkpoints", log, NoProgress())
        return cls(stages, folder, _TOLERANCE[context.device.type])

    @classmethod
    def of_few_views(cls, context: BenchContext, folder: Path) -> _Scene:
        """For stages 2 and 3: stage 1 is short."""
        return cls.of(context, folder, *_FEW_VIEWS, *SHORT)

    def map(self) -> SceneMap:
        """After a stage 1 that starts near the surfaces."""
        scene_map, stage = self.stages.new_field(self.stages.frame())
        start_near_surfaces(stage.renderer)
        self.stages.train_field(scene_map, stage)
        return scene_map


def _on(backend: str, work: Callable[[], Any]) -> Callable[[], Any]:
    """The same work on code of our choice."""

    def run() -> Any:
        with ops.use_backend(backend):
            return work()

    return run


def _error_of(work: Callable[[], Tensors]) -> float:
    """How far the tensors of our kernels are from those of the reference."""
    return relative_error(_on("native", work)(), _on("reference", work)())


def _against_plain(
    name: str,
    run: Callable[[], object],
    result: Callable[[], Tensors],
    tolerance: float,
    size: tuple[float, str],
    notes: Mapping[str, float | str] | None = None,
) -> Comparison:
    """Our kernels against the reference, which judges them by `result`; `size` is the work of a run and its unit."""
    return Comparison(
        name=name,
        run=_on("native", run),
        verify=lambda: _error_of(result),
        tolerance=tolerance,
        peers={_PLAIN: _on("reference", run)},
        work=size[0],
        work_unit=size[1],
        notes=notes or {},
    )


def _nothing() -> None:
    pass


@dataclass
class _Step:
    """Training steps that can be done again and again: the learning rate of the stage is 0.

    Attributes:
        stage: whose steps they are.
        steps: the numbers of those that runs do in turn: no two show the same views.
        parameters: what the stage trains.
        rewind: takes back what a step changes beside the weights.
    """

    stage: Stage
    steps: Sequence[int]
    parameters: Sequence[nn.Parameter]
    rewind: Callable[[], object] = _nothing

    def __post_init__(self) -> None:
        self._turn = itertools.cycle(self.steps)

    def __call__(self) -> dict[str, float]:
        return self._do(next(self._turn))

    def _do(self, k: int) -> dict[str, float]:
        self.rewind()
        return self.stage.step(k)

    def losses(self) -> dict[str, float]:
        """What the first of the steps logs."""
        return self._do(self.steps[0])

    def gradients(self) -> Tensors:
        """Loss () of the first of the steps, and the gradient of each parameter that gets one."""
        loss = torch.tensor(self.losses()["loss"])
        return [loss, *(p.grad.detach().clone() for p in self.parameters if p.grad is not None)]


# ---------------------------------------------------------------------------------------------------------- stage 1

_TARGET_DB, _SMOKE_TARGET_DB = 28.0, 8.0
_LOOK_EVERY = 25  # steps between two looks at the held-out views
_SETTLING = 48  # steps until the rays of a step fit the samples per ray


class _Reached(NamedTuple):
    """When training first reached a quality on held-out views."""

    steps: int
    seconds: float  # of training, without the looks
    psnr_db: float


@torch.no_grad()
def _held_out_psnr(scene_map: SceneMap, views: TrainingViews) -> float:
    """Mean PSNR of renders at the true poses, dB."""
    renderer, nerfp = scene_map.renderer.at_coarseness(1.0), scene_map.nerfp
    codes = nerfp.appearance_code(views.histograms)
    found = []
    for i in range(len(views)):
        code = None if codes is None else codes[i : i + 1]
        shown = render_views(renderer, nerfp, views.c2w[i : i + 1], views.camera, appearance=code, with_posemap=False)
        found.append(psnr_db(shown.rgb[0], views.images[i].float() / 255))
    return sum(found) / len(found)


def _train_until(stage: FieldStage, look: Callable[[], float], target_db: float) -> _Reached:
    """Train until a look finds `target_db`, or to the end of the schedule."""
    seconds, found, steps = 0.0, -math.inf, 0
    while steps < stage.n_steps and found < target_db:
        begin = time.perf_counter()
        stage.step(steps)
        seconds += time.perf_counter() - begin
        steps += 1
        if steps % _LOOK_EVERY == 0 or steps == stage.n_steps:
            found = look()
    return _Reached(steps, seconds, found)


@FAMILIES.register("train/field")
def train_field(context: BenchContext) -> Iterator[Comparison]:
    """Stage 1: time to a PSNR on held-out views, then a step and an update of the occupancy grid."""
    target = _SMOKE_TARGET_DB if context.is_smoke else _TARGET_DB
    with context.kept("train/room") as folder:
        scene = _Scene.of(context, folder)
        with ops.use_backend("native"):
            with yardstick(context.device, context.is_smoke) as peers:
                stage, reached = _field_from_scratch(scene, target)
            after = max(reached.steps, math.ceil(stage.config.coarse[1] * stage.n_steps))
            for k in range(after, after + _SETTLING):
                stage.step(k)
        yield Comparison(
            name=f"train/field/to_{target:.0f}_db",
            run=_nothing,
            verify=lambda: 0.0 if reached.psnr_db >= target else math.inf,
            tolerance=0.0,
            measured_ms=1e3 * reached.seconds,
            measured_peers_ms=peers,
            work=reached.steps,
            work_unit="steps",
            notes={"PSNR of held-out views (dB)": reached.psnr_db},
        )
        yield _field_step(scene, stage, after)
        yield _occupancy_update(scene, stage)


def _field_from_scratch(scene: _Scene, target_db: float) -> tuple[FieldStage, _Reached]:
    """Stage 1 up to a quality on the test views."""
    stages = scene.stages
    scene_map, stage = stages.new_field(stages.frame())
    return stage, _train_until(stage, lambda: _held_out_psnr(scene_map, stages.views["test"]), target_db)


def _field_step(scene: _Scene, stage: FieldStage, after: int) -> Comparison:
    """A step with the map's own marching step, which the schedule has from step `after` on."""
    occupancy, n_rays = stage.renderer.occupancy, stage.n_rays
    every = occupancy.config.update_every
    stage.base_rates = [0.0 for _ in stage.base_rates]
    step = _Step(
        stage,
        steps=[k for k in range(after, after + every) if k % every],
        parameters=[*stage.nerfp.field.grid_parameters(), *stage.nerfp.rendering_parameters()],
        rewind=lambda: setattr(stage, "n_rays", n_rays),
    )
    return _against_plain(
        "train/field/step",
        step,
        step.gradients,
        scene.tolerance,
        (n_rays, "rays"),
        {
            "samples per ray": _on("native", step)()["samples_per_ray"],
            "occupied share of the grid": occupancy.occupied_fraction(),
            "left out": f"the update of the occupancy grid, once in {every} steps",
        },
    )


def _occupancy_update(scene: _Scene, stage: FieldStage) -> Comparison:
    """An update after the warm-up, of a part of the cells."""
    occupancy, before = stage.renderer.occupancy, stage.renderer.occupancy.occs.clone()

    def update() -> Tensors:
        occupancy.occs.copy_(before)
        generator = step_generator(_SEED, "bench/occupancy")
        occupancy.update(occupancy.config.warmup_steps, lambda x: stage.nerfp.field.density(x)[0], generator)
        return [occupancy.occs.clone()]

    cells = int(occupancy.visible.sum())
    return _against_plain("train/field/occupancy_update", update, update, scene.tolerance, (cells, "cells"))


# ---------------------------------------------------------------------------------------------------------- stage 2


@FAMILIES.register("train/pose_branch")
def train_pose_branch(context: BenchContext) -> Iterator[Comparison]:
    """Stage 2: a step."""
    with context.kept(_SMALL_ROOM) as folder:
        scene = _Scene.of_few_views(context, folder)
        config = scene.stages.config.posemap
        with ops.use_backend("native"):
            scene_map = scene.map()
        stage = PoseBranchStage(
            dataclasses.replace(config, lr=0.0),
            scene_map.nerfp,
            scene_map.decoder,
            scene_map.pose_frame,
            scene_map.renderer,
            scene_map.camera,
            scene.stages.sampler(scene_map),
            _SEED,
        )
        step = _Step(stage, range(4), [*scene_map.nerfp.pose_parameters(), *scene_map.decoder.parameters()])
        size = (config.batch, "PoseMaps")
        yield _against_plain("train/pose_branch/step", step, step.gradients, scene.tolerance, size)


# ---------------------------------------------------------------------------------------------------------- stage 3


@dataclass(frozen=True)
class Peer:
    """A step of the online loop with something left out.

    Attributes:
        zero: names of the weights that are 0.
        is_banked: random views are read from a folder instead of rendered.
        same_batch: it sends the same images through the network as the whole step.
    """

    zero: tuple[str, ...] = ()
    is_banked: bool = False
    same_batch: bool = True


_OFFLINE = "without online supervision"
_L_POSEMAP, _L_RVS = ("posemap", "rvs_posemap"), ("rvs",)
PEERS: dict[str, Peer] = {
    _OFFLINE: Peer(_L_POSEMAP, is_banked=True),
    "without L_posemap": Peer(_L_POSEMAP),
    "without L_rvs": Peer(_L_RVS, same_batch=False),
    "without both": Peer(_L_POSEMAP + _L_RVS, same_batch=False),
}
_ONLINE_STEPS = range(4)  # none validates


@dataclass(frozen=True)
class _Loop:
    """A frozen map and a network that has begun to learn, for steps with any losses."""

    scene: _Scene
    scene_map: SceneMap
    online: OnlineMap
    net: APRNet
    config: APRTrainConfig  # learning rate 0, replay of little more than one batch

    @classmethod
    def of(cls, scene: _Scene) -> _Loop:
        """Stages 1 and 2, and the first steps of stage 3."""
        stages = scene.stages
        scene_map = scene.map()
        sampler = stages.sampler(scene_map)
        stages.pose_branch(scene_map, sampler)
        online = stages.online_map(scene_map, sampler)
        net = stages.network("apr", stages.config.apr, online, scene_map.pose_frame)
        n_old, n_fresh = stages.config.apr.replay_batch, stages.config.apr.rvs_batch
        config = dataclasses.replace(stages.config.apr, lr=0.0, replay_capacity=n_fresh * math.ceil(n_old / n_fresh))
        return cls(scene, scene_map, online, net, config)

    def stage(self, peer: Peer) -> APRStage:
        """Stage 3 with what `peer` leaves; its replay is full, its bank holds the views of `_ONLINE_STEPS`."""
        weights = dataclasses.replace(self.config.weights, **dict.fromkeys(peer.zero, 0.0))
        config = dataclasses.replace(self.config, weights=weights)
        online = dataclasses.replace(self.online, bank=self.scene.folder / "bank" if peer.is_banked else None)
        views = self.scene.stages.views
        stage = APRStage(config, self.net, online, views["train"], views["val"], _SEED)
        if stage.random_views is not None:
            for k in range(len(_ONLINE_STEPS) + config.replay_capacity // config.rvs_batch):
                poses, images = stage.random_views.draw(k)
                if k not in _ONLINE_STEPS:
                    stage.replay.add(images, poses, _posemaps(self.scene_map, poses)[0])
        return stage

    def step(self, peer: Peer) -> _Step:
        """Steps of that stage, always from the same replay."""
        stage = self.stage(peer)
        replay = copy.deepcopy(stage.replay)
        parameters = list(self.net.parameters())
        return _Step(stage, _ONLINE_STEPS, parameters, lambda: setattr(stage, "replay", copy.deepcopy(replay)))


@FAMILIES.register("train/online")
def train_online(context: BenchContext) -> Iterator[Comparison]:
    """Stage 3: the parts of a step, then the step."""
    with context.kept(_SMALL_ROOM) as folder:
        scene = _Scene.of_few_views(context, folder)
        with ops.use_backend("native"):
            loop = _Loop.of(scene)
            whole = loop.stage(Peer())
        yield from _online_maps(loop, whole)
        yield _online_network(loop, whole)
        yield _online_step(loop)


def _online_maps(loop: _Loop, stage: APRStage) -> Iterator[Comparison]:
    """What the map does in a step: fresh views, and their PoseMaps."""
    source = stage.random_views
    assert source is not None
    turn, tolerance = itertools.cycle(_ONLINE_STEPS), loop.scene.tolerance
    yield _against_plain(
        "train/online/render",
        lambda: source.draw(next(turn)),
        lambda: [source.draw(_ONLINE_STEPS[0])[1].float()],
        tolerance,
        (loop.config.rvs_batch, "views"),
    )
    fresh, _ = source.draw(_ONLINE_STEPS[0])
    posemaps = functools.partial(_posemaps, loop.scene_map, fresh)
    yield _against_plain("train/online/posemaps", posemaps, posemaps, tolerance, (len(fresh), "PoseMaps"))


@torch.no_grad()
def _posemaps(scene_map: SceneMap, poses: torch.Tensor) -> Tensors:
    return [render_posemaps(scene_map.renderer, scene_map.nerfp, poses, scene_map.camera)]


def _online_network(loop: _Loop, stage: APRStage) -> Comparison:
    """The network forward and backward on as many images as a step has."""
    net, views, n, n_fresh = loop.net, stage.views, loop.config.batch, loop.config.rvs_batch
    old, old_poses = stage.replay.images, stage.replay.poses
    parts = [views.images[torch.arange(n)], torch.cat([old[:n_fresh], old])]
    images = torch.cat([net.resized(network_input(part)) for part in parts])
    target = net.pose_frame.encode(torch.cat([views.c2w[:n], old_poses[:n_fresh], old_poses]))
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    ours = functools.partial(_passes, net, images.contiguous(memory_format=torch.channels_last), target)
    theirs = functools.partial(_passes, plain, images.contiguous(), target)
    return Comparison(
        name="train/online/network",
        run=ours,
        verify=lambda: relative_error(ours(), theirs()),
        tolerance=_NETWORK_TOLERANCE,
        peers={"channels first in memory": theirs},
        work=len(images),
        work_unit="images",
    )


def _passes(net: APRNet, images: torch.Tensor, target: torch.Tensor) -> Tensors:
    """A loss on all that the network says of images (B, 3, h, w) with poses (B, 12): itself and its gradient, (n,)."""
    net.zero_grad(set_to_none=True)
    output = net(images)
    loss = torch.stack([pose_l2(vectors, target) for vectors in output.pose_vectors]).sum()
    if output.posemap is not None:
        loss = loss + output.posemap.square().mean()
    loss.backward()
    return [loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])]


def _online_step(loop: _Loop) -> Comparison:
    """The whole step; less of it are the peers."""
    config = loop.config
    with ops.use_backend("native"):
        step = loop.step(Peer())
        peers = {name: loop.step(peer) for name, peer in PEERS.items()}

    def error() -> float:
        """Of the step, and of the losses that steps on the same images have in common with it."""
        found = [_error_of(step.gradients)]
        with ops.use_backend("native"):
            ours = step.losses()
            for theirs in (peers[name].losses() for name, peer in PEERS.items() if peer.same_batch):
                found += [abs(theirs[loss] - ours[loss]) / abs(ours[loss]) for loss in ("pose", "rvs")]
        return max(found)

    return Comparison(
        name="train/online/step",
        run=_on("native", step),
        verify=error,
        tolerance=max(loop.scene.tolerance, _NETWORK_TOLERANCE),
        peers={name: _on("native", peer) for name, peer in peers.items()} | {_PLAIN: _on("reference", step)},
        work=config.batch + config.rvs_batch + config.replay_batch,
        work_unit="images",
        notes={
            "price of online supervision": f"1 / the ratio to '{_OFFLINE}': as many images, all rendered beforehand",
            "real images": config.batch,
            "fresh views": config.rvs_batch,
            "views of earlier steps": config.replay_batch,
        },
    )
