"""The suites `train` and `pipeline` in a smoke run: right results, honest peers, faults that are found."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from posemap_fast import ops
from posemap_fast.apr import APRNet
from posemap_fast.bench.case import FAMILIES, BenchContext, Comparison
from posemap_fast.bench.machine import YARDSTICK
from posemap_fast.bench.suites import pipeline, train
from posemap_fast.train import apr, nerfp, pose_branch, random_views

pytestmark = pytest.mark.usefixtures("one_thread")
SMOKE = BenchContext(torch.device("cpu"), is_smoke=True)
FAMILY_NAMES = ["train/field", "train/pose_branch", "train/online", "pipeline/room"]


@pytest.fixture(scope="module")
def families(one_thread) -> dict[str, list[Comparison]]:
    return {name: [case for case in FAMILIES.get(name)(SMOKE) if isinstance(case, Comparison)] for name in FAMILY_NAMES}


@pytest.fixture(scope="module")
def cases(families) -> dict[str, Comparison]:
    """By name."""
    return {case.name: case for found in families.values() for case in found}


def test_names_are_unique_and_begin_with_the_family(families, cases) -> None:
    assert len(cases) == sum(len(found) for found in families.values())
    for family, found in families.items():
        assert found and all(case.name.startswith(f"{family}/") for case in found)


def test_every_case_is_right(cases) -> None:
    errors = {name: case.verify() / max(case.tolerance, 1e-30) for name, case in cases.items()}
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    ("name", "n_steps"), [("train/field/step", 15), ("train/pose_branch/step", 4), ("train/online/step", 4)]
)
def test_runs_do_the_same_work_again(cases, name: str, n_steps: int) -> None:
    """The weights stay as they are, whatever ran before."""
    run: Callable[[], Any] = cases[name].run
    losses = [run()["loss"] for _ in range(2 * n_steps)]
    assert losses[:n_steps] == losses[n_steps:] and len(set(losses)) > 1


def images_through_the_network(work: Callable[[], object]) -> int:
    counts = []

    def count(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, APRNet):
            counts.append(len(inputs[0]))

    hook = register_module_forward_pre_hook(count)
    work()
    hook.remove()
    return sum(counts)


def test_step_without_online_supervision_has_as_many_images(cases) -> None:
    step = cases["train/online/step"]
    n_images = images_through_the_network(step.run)
    assert n_images == step.work == 2 + 2 + 4
    counts = {name: images_through_the_network(peer) for name, peer in step.peers.items()}
    real_only = {name for name, peer in train.PEERS.items() if not peer.same_batch}
    assert counts == {name: 2 if name in real_only else n_images for name in step.peers}


def test_peers_render_what_their_names_say(cases, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered = {"render_views": 0, "render_posemaps": 0}

    def counting(module: ModuleType, name: str) -> None:
        original = getattr(module, name)

        def call(renderer: Any, field: Any, poses: torch.Tensor, *rest: Any, **options: Any) -> Any:
            rendered[name] += len(poses)
            return original(renderer, field, poses, *rest, **options)

        monkeypatch.setattr(module, name, call)

    counting(random_views, "render_views")
    counting(apr, "render_posemaps")
    step = cases["train/online/step"]
    found = {}
    for name, work in {"": step.run, **step.peers}.items():
        rendered.update(render_views=0, render_posemaps=0)
        work()
        found[name] = (rendered["render_views"], rendered["render_posemaps"])
    assert found == {
        "": (2, 2),
        "plain torch": (2, 2),
        "without online supervision": (0, 0),
        "without L_posemap": (2, 0),
        "without L_rvs": (0, 0),
        "without both": (0, 0),
    }


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("train/field/step", nerfp, "mse"),
        ("train/pose_branch/step", pose_branch, "render_posemaps"),
        ("train/online/render", random_views, "to_uint8"),
        ("train/online/posemaps", train, "render_posemaps"),
        ("train/online/step", apr, "render_posemaps"),
    ],
)
def test_wrong_result_of_our_kernels_is_found(cases, name, module, function, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(module, function)

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        result = original(*arguments, **options)
        return (result * 1.1).to(result.dtype) if ops.backend_name() == "native" else result

    monkeypatch.setattr(module, function, wrong)
    assert not cases[name].verify() <= cases[name].tolerance


def test_peer_on_other_images_is_found(cases, monkeypatch: pytest.MonkeyPatch) -> None:
    original = random_views.ViewBank.get

    def black(bank: random_views.ViewBank, k: int) -> Any:
        found = original(bank, k)
        return None if found is None else (found[0], torch.zeros_like(found[1]))

    monkeypatch.setattr(random_views.ViewBank, "get", black)
    step = cases["train/online/step"]
    assert not step.verify() <= step.tolerance


def test_quality_that_is_not_reached_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_SMOKE_TARGET_DB", 99.0)
    case = next(iter(FAMILIES.get("train/field")(SMOKE)))
    assert isinstance(case, Comparison) and case.measured_ms is not None
    assert case.name == "train/field/to_99_db" and case.verify() == math.inf


def test_run_tells_of_its_parts_and_its_accuracy(cases) -> None:
    parts = {name.rsplit("/", 1)[1]: case for name, case in cases.items() if name.startswith("pipeline/")}
    assert {"load", "field", "pose_branch", "apr", "total"} <= set(parts)
    assert all(case.measured_ms is not None and case.measured_ms > 0 and not case.peers for case in parts.values())
    assert all(case.measured_peers_ms[YARDSTICK] > 0 for case in parts.values())
    assert "PSNR (dB)" in parts["total"].notes


@pytest.mark.parametrize(
    ("psnr", "metres", "degrees", "error"),
    [
        (30.0, 0.1, 2.0, 0.0),
        (29.9, 0.1, 2.0, math.inf),
        (30.0, 0.3, 2.0, math.inf),
        (30.0, 0.1, 5.0, math.inf),
        (math.nan, 0.1, 2.0, math.inf),
        (30.0, math.nan, 2.0, math.inf),
    ],
)
def test_goal_of_a_run(psnr: float, metres: float, degrees: float, error: float) -> None:
    summary = {
        "nerf": {"psnr_db": psnr},
        "apr": {"median_t_m": metres, "median_r_deg": degrees},
        "baselines": {"nearest_view": {"median_t_m": 0.3, "median_r_deg": 4.0}},
    }
    assert pipeline.Goal(psnr_db=30.0, share=1.0).error(summary) == error
