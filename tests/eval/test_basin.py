"""Walks down the PoseMap loss, in a room whose PoseMap is written down."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
import torch

from posemap_fast.errors import ConfigError
from posemap_fast.eval import pose_errors
from posemap_fast.eval.basin import BasinRow, descend_posemap, displaced, draw_basin, measure_basin
from posemap_fast.geometry import Camera, so3_log
from posemap_fast.progress import NoProgress
from posemap_fast.render import OccupancyConfig, RenderConfig, Renderer, render_posemaps

pytestmark = pytest.mark.usefixtures("one_thread")


class Features(NamedTuple):
    x: torch.Tensor

    def select(self, indices: torch.Tensor) -> Features:
        return Features(self.x[indices])


class EmptyRoom:
    """A cube with opaque walls; a PoseMap shows smooth functions of the seen place, or of nothing."""

    def __init__(self, is_blind: bool = False):
        self.field = self
        self.is_blind = is_blind

    def grid_parameters(self) -> list[torch.nn.Parameter]:
        return []

    def density(self, x: torch.Tensor) -> tuple[torch.Tensor, Features]:
        depth = (x - 0.5).abs().amax(dim=1) - 0.42  # behind the wall
        return 400 * torch.sigmoid(60 * depth), Features(x)

    def pose_hidden(self, x: torch.Tensor, features: Features) -> torch.Tensor:
        u = 4 * (x - 0.5)
        return torch.cat([u, (2 * u).sin(), (2 * u).cos()], dim=1) * (0 if self.is_blind else 1)

    def project(self, hidden: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.fixture
def renderer(frame) -> Renderer:
    config = RenderConfig(steps_per_unit=64, occupancy=OccupancyConfig(resolution=16))
    return Renderer(config, frame, near=0.02)


@pytest.fixture
def camera() -> Camera:
    """A wide one: in a narrow view, a turn and a step aside look alike."""
    return Camera(64, 48, 16.0, 16.0, 32.0, 24.0)


def poses_near_the_middle(n: int) -> torch.Tensor:
    middle = torch.eye(4).repeat(n, 1, 1)
    return displaced(middle, 0.3, 40.0, torch.Generator().manual_seed(4))


def errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pose_errors(found, truth.double())


@pytest.mark.parametrize(("distance", "angle"), [(0.05, 2.0), (1.0, 30.0), (3.0, 120.0)])
def test_displacement_is_exact_in_both(distance: float, angle: float) -> None:
    truth = poses_near_the_middle(50).double()
    moved = displaced(truth, distance, angle, torch.Generator().manual_seed(1))
    t, r = errors(moved, truth)
    torch.testing.assert_close(t, torch.full_like(t, distance), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(r, torch.full_like(r, angle), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved[:, 3], truth[:, 3])


def test_displacement_prefers_no_direction_and_repeats() -> None:
    truth = torch.eye(4, dtype=torch.float64).repeat(4000, 1, 1)
    moved = displaced(truth, 1.0, 90.0, torch.Generator().manual_seed(2))
    axes = so3_log(moved[:, :3, :3])
    for directions in (moved[:, :3, 3], axes / axes.norm(dim=1, keepdim=True)):
        assert float(directions.mean(dim=0).abs().max()) < 4 / math.sqrt(3 * 4000)
        moments = directions.T @ directions / 4000
        torch.testing.assert_close(moments, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=0.03)
    cosines = (moved[:, :3, 3] * axes).sum(dim=1)  # of independent directions
    assert float(cosines.mean().abs()) < 0.1
    assert torch.equal(moved, displaced(truth, 1.0, 90.0, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("loss", ["l2", "cosine"])
def test_a_small_displacement_comes_home_where_the_posemap_tells_of_the_place(renderer, camera, loss) -> None:
    truth = poses_near_the_middle(6)
    start = displaced(truth, 0.1, 5.0, torch.Generator().manual_seed(3))
    ends = []
    for is_blind in (False, True):
        room = EmptyRoom(is_blind)
        wanted = render_posemaps(renderer, room, truth, camera)
        ends.append(descend_posemap(renderer, room, camera, start, wanted, step_t=0.02, step_r_deg=1.0, loss=loss))
    t, r = errors(ends[0], truth)
    assert float(t.max()) < 0.01 and float(r.max()) < 0.5
    assert torch.equal(ends[1], start)  # all PoseMaps are alike: no gradient, no step
    assert not ends[0].requires_grad


def test_the_first_step_is_as_long_as_asked_along_every_axis(renderer, camera) -> None:
    room, truth = EmptyRoom(), poses_near_the_middle(3)
    wanted = render_posemaps(renderer, room, truth, camera)
    start = displaced(truth, 0.2, 10.0, torch.Generator().manual_seed(3))
    end = descend_posemap(renderer, room, camera, start, wanted, step_t=0.03, step_r_deg=2.0, n_steps=1)
    moved = (end - start)[:, :3, 3]
    torch.testing.assert_close(moved.abs(), torch.full((3, 3), 0.03), rtol=1e-3, atol=1e-5)
    turned = so3_log((end[:, :3, :3] @ start[:, :3, :3].transpose(1, 2)).double())
    torch.testing.assert_close(turned.abs(), torch.full((3, 3), math.radians(2.0)).double(), rtol=1e-3, atol=1e-5)


def test_views_of_a_batch_do_not_influence_each_other(renderer, camera) -> None:
    room, truth = EmptyRoom(), poses_near_the_middle(4)
    wanted = render_posemaps(renderer, room, truth, camera)
    start = displaced(truth, 0.2, 10.0, torch.Generator().manual_seed(3))
    options = {"step_t": 0.02, "step_r_deg": 1.0, "n_steps": 10}
    together = descend_posemap(renderer, room, camera, start, wanted, **options)
    alone = descend_posemap(renderer, room, camera, start[2:3], wanted[2:3], **options)
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-4)


class Watch(NoProgress):
    """Remembers what a meter is shown."""

    def __init__(self) -> None:
        self.shown: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def task(self, name: str, total: int, start: int = 0):
        yield self

    def update(self, step: int, **values: float) -> None:
        self.shown.append((step, values["home"]))


def test_a_row_per_start_with_the_errors_of_its_walks(renderer, camera) -> None:
    room, truth, watch = EmptyRoom(), poses_near_the_middle(5), Watch()
    starts = [(0.05, 2.0), (0.1, 5.0)]
    rows = measure_basin(renderer, room, camera, truth, starts, watch, n_steps=40)
    assert [(row.start_t, row.start_r_deg) for row in rows] == starts
    assert all(row.end_t.shape == row.end_r_deg.shape == (5,) and row.share == 1 for row in rows)
    assert watch.shown == [(1, 1.0), (2, 1.0)]


def test_without_a_step_every_walk_ends_where_it_began(renderer, camera) -> None:
    rows = measure_basin(
        renderer, EmptyRoom(), camera, poses_near_the_middle(5), [(0.4, 20.0)], NoProgress(), n_steps=0
    )
    torch.testing.assert_close(rows[0].end_t, torch.full((5,), 0.4).double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[0].end_r_deg, torch.full((5,), 20.0).double(), rtol=1e-3, atol=1e-3)
    assert rows[0].share == 0


def test_starts_follow_the_seed(renderer, camera) -> None:
    def ends(seed: int) -> list[float]:
        truth, starts = poses_near_the_middle(3), [(0.2, 10.0)]
        rows = measure_basin(renderer, EmptyRoom(), camera, truth, starts, NoProgress(), n_steps=2, seed=seed)
        return rows[0].end_t.tolist()

    assert ends(0) == ends(0) != ends(1)


def test_home_is_nearer_than_half_the_start_in_both() -> None:
    end_t = torch.tensor([0.04, 0.05, 0.04, 0.2], dtype=torch.float64)
    end_r = torch.tensor([0.9, 0.9, 1.0, 0.0], dtype=torch.float64)
    row = BasinRow(0.1, 2.0, end_t, end_r)
    assert row.came_home.tolist() == [True, False, False, False]  # exactly half is not home
    assert row.share == 0.25


def test_a_walk_that_was_lost_is_not_home() -> None:
    row = BasinRow(0.1, 2.0, torch.tensor([math.inf, 0.0]).double(), torch.tensor([math.inf, 0.0]).double())
    assert row.share == 0.5


@pytest.mark.parametrize(
    ("n", "starts", "message"),
    [
        (0, [(0.1, 5.0)], "at least one pose"),
        (1, [(0.1, 5.0), (0.0, 5.0)], "must be > 0"),
        (1, [(0.1, -5.0)], "must be > 0"),
    ],
)
def test_nothing_to_walk_from_is_refused(renderer, camera, n: int, starts, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        measure_basin(renderer, EmptyRoom(), camera, poses_near_the_middle(n), starts, NoProgress())


def test_picture_has_a_bar_per_start_and_a_colour_for_each_outcome(tmp_path: Path) -> None:
    home = BasinRow(0.1, 5.0, torch.full((20,), 0.01).double(), torch.full((20,), 0.1).double())
    lost = BasinRow(0.4, 20.0, torch.full((20,), 0.9).double(), torch.full((20,), 60.0).double())
    shares = {}
    for name, rows in {"both": [home, lost], "home": [home], "lost": [lost]}.items():
        draw_basin(tmp_path / f"{name}.png", rows)
        pixels = cv2.imread(str(tmp_path / f"{name}.png")).astype(int)  # blue, green, red
        shares[name] = [bool((pixels[..., a] - pixels[..., b] > 80).any()) for a, b in ((0, 2), (2, 0))]
    assert shares == {"both": [True, True], "home": [True, False], "lost": [False, True]}
    draw_basin(tmp_path / "new" / "basin.svg", [home])
    assert "<svg" in (tmp_path / "new" / "basin.svg").read_text()
    assert {p.name for p in tmp_path.rglob("*.*")} == {"both.png", "home.png", "lost.png", "basin.svg"}


def test_a_walk_that_ends_exactly_at_home_can_be_drawn(tmp_path: Path) -> None:
    draw_basin(tmp_path / "a.png", [BasinRow(0.1, 5.0, torch.zeros(3).double(), torch.zeros(3).double())])
    assert cv2.imread(str(tmp_path / "a.png")) is not None
