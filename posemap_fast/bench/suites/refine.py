"""Poses corrected by render and compare, against descent through the renderer.

The map and the view are those of the suite `render`; the images are the map's own pictures of that view, so what is
measured is the way to the pose, not how well a map of ten seconds looks like a photograph. Starts are as far off as
the answers of a network. Both sides have to come home: ours from every start, the peer, which Adam moves to the end,
from most. `one` is an image alone, as `posemap localize --refine` has it, `eight` as many as `posemap train` judges at
once.
"""

from __future__ import annotations

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
_LEFT, _PEER_LEFT = 0.25, 0.5  # of a start's error, at most: of ours the worst, of the peer the median
_SMOKE_STEPS = 2  # of the peer


@FAMILIES.register("refine/room")
def refine_room(context: BenchContext) -> Iterator[Comparison]:
    """Render and compare, of an image alone and of eight at once."""
    with ops.use_backend("native"):
        room = room_map(context)
        view = render_views(room.renderer, room.nerfp, room.c2w, room.camera, appearance=room.code, with_posemap=False)
    image = view.rgb.permute(0, 3, 1, 2)
    for name, n in _BATCHES.items():
        if context.wants(f"refine/room/{name}"):
            yield _comparison(f"refine/room/{name}", n, context, room, image)


def _comparison(name: str, n: int, context: BenchContext, room: RoomMap, image: torch.Tensor) -> Comparison:
    """`n` images of one view, each from a start of its own."""
    truth = room.c2w.repeat(n, 1, 1)
    start = displaced(truth, _START_M, _START_DEG, step_generator(0, "refine", n))
    codes = None if room.code is None else room.code.repeat(n, 1)
    common = (room.renderer, room.nerfp, room.camera, image.repeat(n, 1, 1, 1), codes, start)
    n_steps = _SMOKE_STEPS if context.is_smoke else inerf.N_STEPS
    notes: dict[str, float | str] = {}

    def ours() -> torch.Tensor:
        with ops.use_backend("native"):
            return refine_poses(*common, REFINEMENT).c2w

    def theirs() -> torch.Tensor:
        with ops.use_backend("native"):
            return inerf.descend(*common, n_steps=n_steps)

    def left(side: str, run: Callable[[], torch.Tensor], share: float, quantile: float) -> float:
        """What is left of the starts' errors, in units of what may be."""
        errors = pose_errors(run().double(), truth.double())
        notes.update(
            {f"{side}, median (m)": float(errors[0].median()), f"{side}, median (deg)": float(errors[1].median())}
        )
        starts = (_START_M, _START_DEG)
        return max(float(e.quantile(quantile)) / (share * before) for e, before in zip(errors, starts, strict=True))

    return Comparison(
        name=name,
        run=ours,
        verify=lambda: max(left("ours", ours, _LEFT, 1.0), left(_INERF, theirs, _PEER_LEFT, 0.5)),
        tolerance=math.inf if context.is_smoke else 1.0,
        peers={_INERF: theirs},
        work=n,
        work_unit="images",
        notes=notes,
    )
