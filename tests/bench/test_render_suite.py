"""The rendering suite at its smallest size, and NeRF-H, its slowest peer, against formulas."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from torch import nn

from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison, Skipped
from posemap_fast.bench.peers import nerf_h
from posemap_fast.bench.peers.nerf_h import CoarseNetwork, FineNetwork, NeRFH, Samples, composite, encode, finer_depths
from posemap_fast.bench.suites import render
from posemap_fast.geometry import Camera
from posemap_fast.ops import CompositeOutput
from posemap_fast.render import RENDER_BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
CONTEXT = BenchContext(torch.device("cpu"), is_smoke=True)
FAMILY_NAMES = [name for name in FAMILIES if name.startswith("render/")]
CAMERA = Camera(13, 7, 11.0, 11.0, 6.5, 3.5)


@pytest.fixture(scope="module")
def room(one_thread) -> render.RoomMap:
    return render.room_map(CONTEXT)


@pytest.fixture
def shared(room: render.RoomMap, monkeypatch) -> None:
    """Families take the map that is there."""
    monkeypatch.setattr(render, "room_map", lambda context: room)


@pytest.fixture(scope="module")
def network() -> NeRFH:
    return NeRFH()


def comparisons(name: str) -> list[Comparison]:
    return [case for case in FAMILIES.get(name)(CONTEXT) if isinstance(case, Comparison)]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_case_is_right_and_runs_with_its_peers(name: str, shared) -> None:
    cases = comparisons(name)
    assert cases
    for case in cases:
        assert case.verify() <= case.tolerance, case.name
        assert case.peers and case.work == 1 and case.work_unit == "images"
        assert case.notes["samples"] == pytest.approx(case.notes["rays"] * case.notes["samples per ray"])
        assert case.notes["samples per ray"] > 1
        for run in (case.run, *case.peers.values()):
            run()


def test_the_first_family_of_a_run_trains_the_map_and_the_others_read_it(tmp_path, monkeypatch) -> None:
    context = dataclasses.replace(CONTEXT, work=tmp_path)
    (first,) = FAMILIES.get("render/pose_gradient")(context)
    monkeypatch.setattr(render, "_train_room", None)
    (again,) = FAMILIES.get("render/pose_gradient")(context)
    assert first.verify() <= first.tolerance and again.verify() <= again.tolerance
    assert first.notes == again.notes
    for ours, theirs in zip(first.run(), again.run(), strict=True):
        assert torch.equal(ours, theirs)


def test_names_are_unique_and_what_is_missing_is_said(shared) -> None:
    found = [case for name in FAMILY_NAMES for case in FAMILIES.get(name)(CONTEXT)]
    assert len({case.name for case in found}) == len(found)
    skipped = [case for case in found if isinstance(case, Skipped)]
    assert len(skipped) == 3 and all("CUDA" in case.reason for case in skipped)


def test_sizes_are_those_of_the_paper(room: render.RoomMap) -> None:
    cases = [case for cases in render._CASES.values() for case in cases]
    names = {case.full_name(case.camera(room, is_smoke=False)) for case in cases}
    assert names == {
        "rgb/240x427",
        "training_view/72x96",
        "posemap/15x26",
        "posemap/30x53",
        "rgb_and_posemap/240x427",
        "posemap_pose_gradient/15x26",
        "dfnet_training_view/72x96",
        "dfnet_posemap/15x26",
    }


def _brighter(out: CompositeOutput) -> CompositeOutput:
    return out._replace(rgb=out.rgb * 1.01, features=out.features * 1.01)


def _steeper(out: CompositeOutput) -> CompositeOutput:
    """The right values with a gradient that is 1 % off."""
    return out._replace(features=out.features + 0.01 * (out.features - out.features.detach()))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [*((name, _brighter) for name in FAMILY_NAMES), ("render/pose_gradient", _steeper)],
)
def test_a_wrong_rendering_is_found(name: str, spoil, room: render.RoomMap, monkeypatch) -> None:
    native = RENDER_BACKENDS.get("native")
    wrong = dataclasses.replace(native, composite=lambda *arguments: spoil(native.composite(*arguments)))
    renderer = room.renderer.at_coarseness(1.0)
    renderer.backend = wrong
    monkeypatch.setattr(render, "room_map", lambda context: dataclasses.replace(room, renderer=renderer))
    for case in comparisons(name):
        assert case.verify() > case.tolerance, case.name


def test_the_parameters_are_those_of_the_docstring(network: NeRFH) -> None:
    told = re.findall(r"\d+ \d{3}(?=,| parameters|\.)", " ".join((nerf_h.__doc__ or "").split()))
    counted = [sum(p.numel() for p in part.parameters()) for part in (network.coarse, network.fine)]
    assert [int(number.replace(" ", "")) for number in told] == counted


def test_encodings_have_the_papers_sizes() -> None:
    x = torch.tensor([[0.1, -0.2, 0.3]])
    assert encode(x, 10).shape == (1, 63) and encode(x, 4).shape == (1, 27)
    wanted = [*x[0], *torch.sin(x[0]), *torch.sin(2 * x[0]), *torch.cos(x[0]), *torch.cos(2 * x[0])]
    torch.testing.assert_close(encode(x, 2)[0], torch.stack(wanted))


def test_a_view_has_the_cameras_size_however_it_is_cut(network: NeRFH, monkeypatch) -> None:
    view = network.render_view(CAMERA, torch.eye(4))
    assert view.shape == (7, 13, 3) and 0 <= float(view.min()) and float(view.max()) <= 1
    monkeypatch.setitem(nerf_h._RAYS_AT_ONCE, "cpu", 10)
    torch.testing.assert_close(network.render_view(CAMERA, torch.eye(4)), view, rtol=1e-4, atol=1e-5)


def test_a_ray_costs_64_and_128_evaluations(network: NeRFH) -> None:
    n_evaluated: list[int] = []
    parts = (network.coarse.trunk, network.fine.trunk)
    hooks = [
        part.register_forward_hook(lambda _, inputs, out: n_evaluated.append(out[..., 0].numel())) for part in parts
    ]
    network.render_view(CAMERA, torch.eye(4))
    for hook in hooks:
        hook.remove()
    assert n_evaluated == [13 * 7 * 64, 13 * 7 * 128]


def test_weights_share_out_the_light_of_a_ray(network: NeRFH) -> None:
    out = network.render_rays(torch.zeros(5, 3), nn.functional.normalize(torch.randn(5, 3), dim=1))
    assert out.weights.shape == (5, 128) and out.rgb.shape == (5, 3)
    assert bool((out.weights >= 0).all()) and bool((out.weights.sum(dim=1) <= 1 + 1e-5).all())
    torch.testing.assert_close(out.opacity, out.weights.sum(dim=1))
    assert bool((out.beta >= 0.1).all()) and bool((out.depth > 0).all())


class _ConstantCoarse(CoarseNetwork):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x[..., 0], 0.004)


class _ConstantFine(FineNetwork):
    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> Samples:
        one = torch.ones_like(x[..., 0])
        return Samples(0.004 * one, torch.full_like(x, 0.25), 0 * one, torch.zeros_like(x), one)


def test_constant_density_has_the_analytic_opacity() -> None:
    network = NeRFH(near=0.5, far=4.0)
    network.coarse, network.fine = _ConstantCoarse(), _ConstantFine()
    out = network.render_rays(torch.zeros(3, 3), torch.eye(3))
    opacity = 1 - math.exp(-0.004 * (4.0 - 0.5 + 100))  # the last sample is 100 long
    torch.testing.assert_close(out.opacity, torch.full((3,), opacity), rtol=1e-4, atol=0)
    torch.testing.assert_close(out.rgb, torch.full((3, 3), 0.25 * opacity), rtol=1e-4, atol=0)
    torch.testing.assert_close(out.beta, torch.full((3,), 0.1))


def test_transient_matter_shows_its_colour_and_hides_what_is_behind() -> None:
    depths = torch.tensor([[1.0, 2.0]])
    zero, one = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    red, blue = torch.tensor([1.0, 0, 0]).expand(1, 2, 3), torch.tensor([0, 0, 1.0]).expand(1, 2, 3)
    out = composite(depths, Samples(zero, red, one, blue, torch.full((1, 2), 0.5)))
    behind = math.exp(-1)
    torch.testing.assert_close(out.rgb, torch.tensor([[behind, 0, 1 - behind]]))
    torch.testing.assert_close(out.depth, torch.tensor([1 - behind + 2 * behind]))
    torch.testing.assert_close(out.beta, torch.tensor([0.1 + 0.5 * (1 - behind)]))


def test_finer_samples_go_where_the_weights_are() -> None:
    depths = torch.linspace(0, 1, 64).expand(2, -1)
    weights = torch.zeros(2, 64)
    weights[0, 20], weights[1] = 0.9, 0.01
    found = finer_depths(depths, weights, 64)
    assert found.shape == (2, 128) and bool((found.diff(dim=1) >= 0).all())
    assert all(float((found[0] - depth).abs().min()) < 1e-6 for depth in depths[0])
    near = ((found - 20 / 63).abs() < 0.51 / 63).sum(dim=1)
    assert near[0] >= 60 and near[1] <= 4


def test_the_weights_are_those_of_the_seed_and_cost_no_random_numbers(network: NeRFH) -> None:
    torch.manual_seed(3)
    other = NeRFH()
    assert torch.equal(other.fine.trunk.layers[0].weight, network.fine.trunk.layers[0].weight)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
