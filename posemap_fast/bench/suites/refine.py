"""Poses corrected by render and compare, against descent through the renderer.

The map and the view are those of the suite `render`; the images are the map's own pictures of that view, so what is
measured is the way to the pose, not how well a map of ten seconds looks like a photograph. Starts are as far off as
the answers of a network. Both sides have to come home: a case is judged by the largest of what is left of the starts'
errors, of ours and of the peer. `one` is an image alone, as `posemap localize --refine` has it, `eight` as many as
`posemap train` judges at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch

from posemap_fast import ops
from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison
from posemap_fast.bench.peers import inerf
from posemap_fast.bench.suites.render import RoomMap, room_map
from posemap_fast.eval import pose_errors
from posemap_fast.eval.basin import displaced
from posemap_fast.localize import REFINEMENT
from posemap_fast.render import refine_poses, render_views
from posemap_fast.seeding import step_generator

__all__: list[str] = []

_INERF = f"iNeRF, {inerf.N_STEPS} steps"
_BATCHES = {"one": 1, "eight": 8}
_START_M, _START_DEG = 0.1, 2.0  # what the network is wrong by in `room`
_LEFT = 0.25  # of a start's error, at most
_SMOKE_SIDE, _SMOKE_STEPS = 24, 2


@FAMILIES.register("refine/room")
def refine_room(context: BenchContext) -> Iterator[Comparison]:
    """A case per number of images."""
    with ops.use_backend("native"):
        room = room_map(context)
        if context.is_smoke:
            room = dataclasses.replace(room, camera=room.camera.resized(_SMOKE_SIDE * 4 // 3, _SMOKE_SIDE))
        view = render_views(room.renderer, room.nerfp, room.c2w, room.camera, appearance=room.code, with_posemap=False)
    image = view.rgb.permute(0, 3, 1, 2)
    for name, n in _BATCHES.items():
        yield _comparison(name, n, context, room, image)


def _comparison(name: str, n: int, context: BenchContext, room: RoomMap, image: torch.Tensor) -> Comparison:
    """`n` images of one view, each from a start of its own."""
    truth = room.c2w.repeat(n, 1, 1)
    start = displaced(truth, _START_M, _START_DEG, step_generator(0, "refine", n))
    images = image.repeat(n, 1, 1, 1)
    codes = None if room.code is None else room.code.repeat(n, 1)
    common = (room.renderer, room.nerfp, room.camera, images, codes, start)
    n_steps = _SMOKE_STEPS if context.is_smoke else inerf.N_STEPS

    def ours() -> torch.Tensor:
        with ops.use_backend("native"):
            return refine_poses(*common, REFINEMENT).c2w

    def theirs() -> torch.Tensor:
        with ops.use_backend("native"):
            return inerf.descend(*common, n_steps=n_steps)

    sides: dict[str, Callable[[], torch.Tensor]] = {"ours": ours, _INERF: theirs}
    notes: dict[str, float | str] = {}
    left = []
    for side, run in sides.items():
        errors = pose_errors(run().double(), truth.double())
        for what, error, before in zip(("m", "deg"), errors, (_START_M, _START_DEG), strict=True):
            notes[f"{side}, median ({what})"] = float(error.median())
            left.append(float(error.max()) / before)
    return Comparison(
        name=f"refine/room/{name}",
        run=ours,
        verify=functools.partial(max, left),
        tolerance=math.inf if context.is_smoke else _LEFT,
        peers={_INERF: theirs},
        work=n,
        work_unit="images",
        notes=notes,
    )
