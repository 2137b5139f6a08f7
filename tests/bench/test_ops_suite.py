"""The cases of the ops: all verify at the smallest size, and each op is there forward and backward."""

from __future__ import annotations

import pytest
import torch

from posemap_fast import ops
from posemap_fast.bench.case import BenchContext, Comparison
from posemap_fast.bench.suites import FAMILIES
from posemap_fast.bench.verify import relative_error, worst_error

FAMILY_NAMES = [name for name in FAMILIES if name.startswith("ops/")]
CONTEXT = BenchContext(torch.device("cpu"), is_smoke=True)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_case_is_right_at_the_smallest_size(name: str) -> None:
    cases = list(FAMILIES.get(name)(CONTEXT))
    assert cases and len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert isinstance(case, Comparison) and case.peers and case.work > 0
        assert case.verify() <= case.tolerance, case.name
        case.run()


@pytest.mark.parametrize("name", ["hash_encode", "composite", "fused_mlp", "sh_encode", "deferred"])
def test_differentiable_ops_are_timed_forward_and_backward(name: str) -> None:
    names = [case.name for case in FAMILIES.get(f"ops/{name}")(CONTEXT)]
    assert names == [f"{name}/forward/smoke", f"{name}/forward_backward/smoke"]


@pytest.mark.parametrize("op", ["hash_encode", "composite", "fused_mlp", "sh_encode", "march", "compact"])
def test_a_wrong_kernel_is_found(op: str, monkeypatch) -> None:
    original = getattr(ops, op)

    def wrong(*arguments, **options):
        found = original(*arguments, **options)
        if isinstance(found, torch.Tensor):
            return found * 1.01
        return type(found)(*(t * 2 if t.is_floating_point() else t + 1 for t in found))

    monkeypatch.setattr(ops, op, wrong)
    case = next(iter(FAMILIES.get(f"ops/{op}")(CONTEXT)))
    assert case.verify() > case.tolerance


def test_errors_are_relative_and_nan_is_infinite() -> None:
    one = torch.ones(4)
    assert relative_error([one * 1.5], [one]) == pytest.approx(0.5)
    assert relative_error([one, one * 3], [one, one]) == pytest.approx(2)
    assert relative_error([torch.tensor([1.0, float("nan")])], [torch.ones(2)]) == float("inf")
    assert relative_error([torch.ones(3)], [torch.ones(4)]) == float("inf")
    assert worst_error([lambda: [one], lambda: [one * 2]], lambda: [one]) == pytest.approx(1)
