"""The benchmark of refined answers at its smallest size, and its peer where it can come home."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from posemap_fast.bench.case import FAMILIES, BenchContext
from posemap_fast.bench.peers import inerf
from posemap_fast.bench.suites import refine
from posemap_fast.bench.suites.render import RoomMap, room_map
from posemap_fast.eval.basin import displaced
from posemap_fast.geometry import Camera, camera_rays, make_c2w, so3_exp

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = BenchContext(torch.device("cpu"), is_smoke=True)


@pytest.fixture(scope="module")
def room(one_thread) -> RoomMap:
    return room_map(CONTEXT)


@pytest.fixture(autouse=True)
def shared(room: RoomMap, monkeypatch) -> None:
    """All take the map that is there."""
    monkeypatch.setattr(refine, "room_map", lambda context: room)


def test_every_case_runs_with_its_peer_and_tells_what_is_left() -> None:
    cases = list(FAMILIES.get("refine/room")(CONTEXT))
    assert [case.work for case in cases] == [1, 8]
    for case in cases:
        assert not case.notes and case.verify() <= case.tolerance
        assert {name.split(",")[0] for name in case.notes} == {"ours", "iNeRF"}
        for run in (case.run, *case.peers.values()):
            assert run().shape == (case.work, 4, 4)
    only = dataclasses.replace(CONTEXT, only="*/one")
    assert [case.name for case in FAMILIES.get("refine/room")(only)] == ["refine/room/one"]


class Answer(torch.Tensor):
    """Poses that are also an answer with them."""

    @property
    def c2w(self) -> torch.Tensor:
        return self


@pytest.mark.parametrize(
    ("ours", "theirs", "left"), [(0, 0, 0.0), (8, 0, 1 / 0.25), (1, 0, 1 / 0.25), (0, 8, 1 / 0.5), (0, 3, 0.0)]
)
def test_a_side_that_stays_where_it_was_is_wrong(ours: int, theirs: int, left: float, monkeypatch) -> None:
    """So many of eight stay: one of ours is enough, of the peer's it takes a half."""
    truths = []
    monkeypatch.setattr(refine, "displaced", lambda c2w, *rest: truths.append(c2w) or displaced(c2w, *rest))

    def staying(n: int) -> Callable[..., torch.Tensor]:
        return lambda *common, **_: torch.cat([common[5][:n], truths[0][n:]]).as_subclass(Answer)

    monkeypatch.setattr(refine, "refine_poses", staying(ours))
    monkeypatch.setattr(inerf, "descend", staying(theirs))
    (case,) = FAMILIES.get("refine/room")(dataclasses.replace(CONTEXT, only="*/eight"))
    assert case.verify() == pytest.approx(left, abs=1e-2)


class Painting:
    """A renderer of a wall at z = 3 whose colours are smooth functions of the place."""

    def render_rays(self, field, rays_o, rays_d, appearance=None):
        at = rays_o + rays_d * ((3 - rays_o[:, 2:]) / rays_d[:, 2:])
        x, y = at[:, 0], at[:, 1]
        self.rgb = 0.5 + 0.5 * torch.stack([(2 * x).sin(), (2 * y).sin(), (1.5 * x + y).cos()], dim=1)
        return self


def test_inerf_comes_home_on_a_painted_wall() -> None:
    camera = Camera(48, 36, 40.0, 40.0, 24.0, 18.0)
    truth = make_c2w(torch.eye(3)[None], torch.zeros(1, 3))
    rays = camera_rays(camera, truth, camera.pixel_grid())
    image = Painting().render_rays(None, *(part.reshape(-1, 3) for part in rays)).rgb
    image = image.reshape(1, 36, 48, 3).permute(0, 3, 1, 2)
    start = make_c2w(so3_exp(torch.tensor([[0.0, 0.0, 0.04]])), torch.tensor([[0.08, -0.05, 0.03]]))
    found = inerf.descend(Painting(), None, camera, image, None, start, n_steps=300)  # as the paper
    assert float((found - truth).abs().max()) < 0.2 * float((start - truth).abs().max())
