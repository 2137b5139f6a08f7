"""Views and PoseMaps of a trained map, against plain PyTorch, the CUDA libraries for the same work, and NeRF-H.

The map is the scene `room` with the sizes of the preset `cpu`, trained by stage 1 once in a run, from near its surfaces
(`bench.surfaces`): its rays march 19 samples and see 12 of them, where those of the preset's whole schedule march 21
and see 9. All cases show the training view whose rays march the median number of samples.

`plain torch` is the same rendering with every operation a torch expression. Colours and PoseMap at once are timed
against the two one after the other. NeRF-H is another method: one view of its 60 x 106 pixels against one training
view, or one PoseMap, of ours. That is the comparison that matters to a training, which needs a picture (DFNet) or the
features of one (PoseMap) at a random pose, and it is how both papers make it.

Tolerances are relative 2-norms. Rounding differs between the sides, and may move a sample across the border of an
occupied cell or past the threshold of what is hidden. On CUDA our networks, like tiny-cuda-nn's, compute in half.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from posemap_fast import ops
from posemap_fast.apr import PoseFrame
from posemap_fast.backends import why_not
from posemap_fast.bench.case import FAMILIES, REPEATED, BenchContext, Comparison, Family, Skipped
from posemap_fast.bench.peers.nerf_h import VIEW_SIZE, NeRFH
from posemap_fast.bench.surfaces import SHORT, start_near_surfaces
from posemap_fast.bench.verify import Tensors, worst_error
from posemap_fast.data import estimate_frame, load_scene
from posemap_fast.errors import BackendError
from posemap_fast.experiment import ExperimentConfig, load_experiment
from posemap_fast.fields import NeRFP
from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.localize import SceneMap
from posemap_fast.render import Renderer, posemap_shape, render_posemaps, render_views
from posemap_fast.train import FieldStage, TrainingViews, prune_occupancy

__all__ = ["RoomMap", "room_map"]

_PLAIN, _NERF_H, _APART = "plain torch", "DFNet's NeRF-H", "one after the other"
_FIELD, _BACKEND = "tcnn", "nerfacc"
_LIBRARIES = f"{_FIELD} field + {_BACKEND}"
_TOLERANCES = {"cpu": 1e-4, "cuda": 2e-2}
_GRADIENT = 10.0  # times the tolerance: terms of many samples cancel in the gradient of a pose
_SMOKE_SHRINK = 8
_SHORT = (
    *SHORT,
    "field.finest_resolution=304",  # what training derives from this scene's cameras
)
_SMOKE = (
    "nerf.steps=10",
    "nerf.samples_per_step=1024",
    "render.steps_per_unit=48",
    "render.occupancy.resolution=16",
    "field.log2_hashmap_size=10",
    "field.finest_resolution=32",
)


@dataclass(frozen=True)
class RoomMap:
    """A frozen map of the room and the view of it that is rendered."""

    nerfp: NeRFP
    renderer: Renderer
    camera: Camera
    c2w: torch.Tensor  # (1, 4, 4) world frame, metres
    code: torch.Tensor | None  # (1, dim) appearance

    def on(self, field: str, backend: str) -> RoomMap:
        """The same map evaluated by another field backbone and render backend.

        Raises:
            BackendError: one of them cannot run here.
        """
        old = self.renderer
        new = Renderer(dataclasses.replace(old.config, backend=backend), old.frame, old.near)
        new.occupancy = old.occupancy
        nerfp = self.nerfp.with_backbone(field)
        nerfp.requires_grad_(False)
        return dataclasses.replace(self, nerfp=nerfp, renderer=new)

    def at_coarseness(self, coarseness: float) -> RoomMap:
        """The same map with longer steps along the rays."""
        return dataclasses.replace(self, renderer=self.renderer.at_coarseness(coarseness))

    def n_samples(self, c2w: torch.Tensor, camera: Camera, points: torch.Tensor) -> int:
        """Samples that the rays of a pose (4, 4) through image points (n, 2) march."""
        rays = self.renderer.to_field(*camera_rays(camera, c2w, points.to(c2w)))
        return self.renderer.march(*rays, None).t_starts.numel()


def room_map(context: BenchContext) -> RoomMap:
    """The map that the families of a run share, and its view; the first to ask trains it."""
    preset, overrides = ("smoke", _SMOKE) if context.is_smoke else ("cpu", _SHORT)
    config = load_experiment(preset, (), [*overrides, f"device={context.device}"]).resolved()
    with context.kept("render/room") as folder:
        paths = folder / "scene.map", folder / "view.pt"
        if not paths[1].exists():
            trained, view = _train_room(context, config)
            trained.save(paths[0])
            torch.save(view, paths[1])
        found = SceneMap.load(paths[0], device=context.device)
        c2w, code = torch.load(paths[1], map_location=context.device, weights_only=True)
    room = RoomMap(found.nerfp, found.renderer, found.camera, c2w, code)
    return room.on(config.field.backbone, config.render.backend)


def _train_room(
    context: BenchContext, config: ExperimentConfig
) -> tuple[SceneMap, tuple[torch.Tensor, torch.Tensor | None]]:
    """Trace the room and train stage 1 on it, about ten seconds on two CPU cores: the map, the view's pose and code."""
    n_views, width = (12, 32) if context.is_smoke else (32, 160)
    scene = load_scene(
        "room", n_train=n_views, n_val=0, n_test=1, n_unlabelled=0, width=width, height=width * 3 // 4, supersample=1
    )
    index = torch.tensor(scene.views("train"))
    views = TrainingViews.of(scene.images.select(index), scene.c2w[index], scene.camera).to(context.device)
    estimate = estimate_frame(scene)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = (config.field, config.render, estimate.frame, estimate.near)
        found = SceneMap.untrained("room", *sizes, PoseFrame(), scene.camera).to(context.device)
    nerfp, renderer = found.nerfp, found.renderer
    if nerfp.appearance is not None:
        nerfp.appearance.mean_histogram.copy_(views.histograms.mean(dim=0))
    start_near_surfaces(renderer)
    stage = FieldStage(config.nerf, nerfp, renderer, views, seed=0)
    for k in range(stage.n_steps):
        stage.step(k)
    renderer.set_coarseness(1.0)
    prune_occupancy(nerfp, renderer, views, seed=0)
    nerfp.requires_grad_(False)
    codes = nerfp.appearance_code(views.histograms)
    view = _typical_view(RoomMap(nerfp, renderer, scene.camera, views.c2w, codes))
    return found, (view.c2w, view.code)


def _typical_view(room: RoomMap) -> RoomMap:
    """The view of a map with many, (n, 4, 4) and (n, dim), whose rays march the median number of samples."""
    points = room.camera.cell_centers(9, 12)
    counts = [room.n_samples(pose, room.camera, points) for pose in room.c2w]
    k = int(torch.tensor(counts).argsort()[len(counts) // 2])
    code = None if room.code is None else room.code[k : k + 1]
    return dataclasses.replace(room, c2w=room.c2w[k : k + 1], code=code)


def _colours(room: RoomMap, camera: Camera) -> Tensors:
    """Colour and depth of every pixel."""
    return render_views(room.renderer, room.nerfp, room.c2w, camera, appearance=room.code, with_posemap=False)[:2]


@torch.no_grad()
def _posemap(room: RoomMap, camera: Camera) -> Tensors:
    return [render_posemaps(room.renderer, room.nerfp, room.c2w, camera)]


def _both(room: RoomMap, camera: Camera) -> Tensors:
    """Colour and depth of every pixel, and the PoseMap, at once."""
    view = render_views(room.renderer, room.nerfp, room.c2w, camera, appearance=room.code)
    assert view.posemap is not None
    return [view.rgb, view.depth, view.posemap]


def _apart(room: RoomMap, camera: Camera) -> Tensors:
    """The same by two calls, each of which has a case of its own against plain torch."""
    with ops.use_backend("native"):
        return [*_colours(room, camera), *_posemap(room, camera)]


def _pose_gradient(room: RoomMap, camera: Camera) -> Tensors:
    """The PoseMap, and the gradient of its squared length to the pose."""
    c2w = room.c2w.clone().requires_grad_()
    posemap = render_posemaps(room.renderer, room.nerfp, c2w, camera)
    return [posemap.detach(), *torch.autograd.grad(posemap.square().sum(), c2w)]


def _pixels(camera: Camera) -> torch.Tensor:
    return camera.pixel_grid()


def _cells(camera: Camera) -> torch.Tensor:
    return camera.cell_centers(*posemap_shape(camera))


@dataclass(frozen=True)
class _Case:
    """A row of the table below.

    Attributes:
        name: without its size.
        work: what is rendered.
        size: height and width of the view, pixels.
        points: where the rays of the work pass through the image.
        peers: names; `_LIBRARIES` only where they can run.
        coarseness: of the steps along the rays.
        tolerance_factor: times the device's tolerance.
    """

    name: str
    work: Callable[[RoomMap, Camera], Tensors]
    size: tuple[int, int]
    points: tuple[Callable[[Camera], torch.Tensor], ...] = (_cells,)
    peers: tuple[str, ...] = (_PLAIN, _LIBRARIES)
    coarseness: float = 1.0
    tolerance_factor: float = 1.0
    min_repeats: int = 5

    def camera(self, room: RoomMap, is_smoke: bool) -> Camera:
        """The map's camera at the size of the view."""
        height, width = (max(8, side // _SMOKE_SHRINK) if is_smoke else side for side in self.size)
        return room.camera.resized(width, height)

    def full_name(self, camera: Camera) -> str:
        """With the size of the image, or of the PoseMap where that is all that is rendered."""
        size = (camera.height, camera.width) if _pixels in self.points else posemap_shape(camera)
        return "{}/{}x{}".format(self.name, *size)


REPEATED.update({"render/posemaps", "render/pose_gradient"})
_VIEW, _TRAINING_VIEW = (240, 427), (72, 96)
_COARSE = 2.0  # of training views in the preset `cpu`, whose size `_TRAINING_VIEW` is
_CASES: dict[str, Sequence[_Case]] = {
    "views": [
        _Case("rgb", _colours, _VIEW, (_pixels,), min_repeats=2),
        _Case("training_view", _colours, _TRAINING_VIEW, (_pixels,), coarseness=_COARSE),
    ],
    "posemaps": [
        _Case("posemap", _posemap, _VIEW),
        _Case("posemap", _posemap, (480, 854)),
    ],
    "both": [_Case("rgb_and_posemap", _both, _VIEW, (_pixels, _cells), (_APART, _LIBRARIES), min_repeats=3)],
    "pose_gradient": [
        _Case("posemap_pose_gradient", _pose_gradient, _VIEW, peers=(_PLAIN,), tolerance_factor=_GRADIENT),
    ],
    "dfnet": [
        _Case("dfnet_training_view", _colours, _TRAINING_VIEW, (_pixels,), (_NERF_H,), _COARSE, min_repeats=3),
        _Case("dfnet_posemap", _posemap, _VIEW, peers=(_NERF_H,), min_repeats=3),
    ],
}


def _family(name: str, context: BenchContext) -> Iterator[Comparison | Skipped]:
    """The cases of one entry of the table, on a map of their own."""
    with ops.use_backend("native"):
        room = room_map(context)
    sides = {_PLAIN: room.on("reference", "reference")}
    if any(_LIBRARIES in case.peers for case in _CASES[name]):
        found = _on_libraries(room, context.device)
        if isinstance(found, RoomMap):
            sides[_LIBRARIES] = found
        else:
            yield Skipped(f"{name}: {_LIBRARIES}", found)
    for case in _CASES[name]:
        yield _comparison(case, context, room, sides)


def _on_libraries(room: RoomMap, device: torch.device) -> RoomMap | str:
    """The map on tiny-cuda-nn and nerfacc, or why that cannot run here."""
    reasons = [reason for name in (_FIELD, _BACKEND) if (reason := why_not(name, device))]
    if reasons:
        return "; ".join(reasons)
    try:
        return room.on(_FIELD, _BACKEND)
    except BackendError as error:
        return str(error)


def _comparison(case: _Case, context: BenchContext, room: RoomMap, sides: dict[str, RoomMap]) -> Comparison:
    """A case on our kernels, judged by the side `_PLAIN`."""
    camera = case.camera(room, context.is_smoke)

    def bound(side: RoomMap) -> Callable[[], Tensors]:
        return functools.partial(case.work, side.at_coarseness(case.coarseness), camera)

    def ours() -> Tensors:
        with ops.use_backend("native"):
            return native()

    native = bound(room)
    works = {name: bound(side) for name, side in sides.items()} | {_APART: lambda: _apart(room, camera)}
    theirs = {name: works[name] for name in works if name in case.peers}
    nerf_h = [_nerf_h(room, context)] if _NERF_H in case.peers else []
    return Comparison(
        name=case.full_name(camera),
        run=ours,
        verify=functools.partial(worst_error, [ours, *(theirs[n] for n in theirs if n != _PLAIN)], works[_PLAIN]),
        tolerance=_TOLERANCES[context.device.type] * case.tolerance_factor,
        peers={**theirs, **dict(nerf_h)},
        work_unit="images",
        notes=_notes(case, room, camera),
        min_repeats=case.min_repeats,
    )


def _nerf_h(room: RoomMap, context: BenchContext) -> tuple[str, Callable[[], torch.Tensor]]:
    """Name and work of DFNet's rendering of the same view."""
    height, width = (side // _SMOKE_SHRINK if context.is_smoke else side for side in VIEW_SIZE)
    network = NeRFH().to(context.device)
    run = functools.partial(network.render_view, room.camera.resized(width, height), room.c2w[0])
    return f"{_NERF_H} {height}x{width}", run


def _notes(case: _Case, room: RoomMap, camera: Camera) -> dict[str, float | str]:
    """Rays and marched samples of one run."""
    room = room.at_coarseness(case.coarseness)
    points = [place(camera) for place in case.points]
    n_rays = sum(map(len, points))
    n_samples = sum(room.n_samples(room.c2w[0], camera, part) for part in points)
    notes: dict[str, float | str] = {"rays": n_rays, "samples": n_samples, "samples per ray": n_samples / n_rays}
    if _NERF_H in case.peers:
        notes["compared"] = "one image with one view of another method"
    return notes


for _name in _CASES:
    _registered: Family = functools.partial(_family, _name)
    FAMILIES.register(f"render/{_name}")(_registered)
