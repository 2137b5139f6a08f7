"""Distortion against the double sum of its definition, and opacity entropy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posemap_fast.errors import ShapeError
from posemap_fast.losses import distortion_loss, opacity_entropy


def _packed(counts: list[int], seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Random weights and sorted, disjoint intervals for rays with the given numbers of samples."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(sum(counts), generator=generator, dtype=dtype)
    edges = [torch.rand(2 * n, generator=generator, dtype=dtype).sort().values.view(n, 2) for n in counts]
    intervals = torch.cat([torch.zeros(0, 2, dtype=dtype), *edges])
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return weights, intervals[:, 0].clone(), intervals[:, 1].clone(), offsets


def _brute_force(weights: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, offsets: torch.Tensor) -> float:
    total = 0.0
    bounds = offsets.tolist()
    for first, last in itertools.pairwise(bounds):
        w, middle = weights[first:last], (starts[first:last] + ends[first:last]) / 2
        gaps = (middle[:, None] - middle[None]).abs()
        total += float((w[:, None] * w[None] * gaps).sum())
        total += float((w.square() * (ends[first:last] - starts[first:last])).sum()) / 3
    return total / max(len(bounds) - 1, 1)


def test_the_worked_example_of_the_docstring():
    value = distortion_loss(
        torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0]), torch.tensor([0, 2])
    )
    assert value.item() == pytest.approx(1 + 0.5 / 3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 2**20))
def test_prefix_sums_equal_the_double_sum(counts, seed):
    packed = _packed(counts, seed)
    assert distortion_loss(*packed).item() == pytest.approx(_brute_force(*packed), rel=1e-9, abs=1e-12)


def test_float32_rays_late_in_a_long_batch_keep_their_digits():
    packed = _packed([50] * 2000, seed=1, dtype=torch.float32)
    exact = _brute_force(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in packed))
    assert distortion_loss(*packed).item() == pytest.approx(exact, rel=1e-6)


def test_distortion_passes_gradcheck():
    weights, starts, ends, offsets = _packed([3, 0, 4, 1], seed=2)
    inputs = tuple(tensor.requires_grad_() for tensor in (weights, starts, ends))
    assert torch.autograd.gradcheck(lambda w, s, e: distortion_loss(w, s, e, offsets), inputs)


def test_a_compact_distribution_costs_less_than_a_spread_one():
    starts, offsets = torch.arange(4.0), torch.tensor([0, 4])
    compact, spread = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.full((4,), 0.25)
    assert distortion_loss(compact, starts, starts + 1, offsets) < distortion_loss(spread, starts, starts + 1, offsets)


@pytest.mark.parametrize("offsets", [[0], [0, 0, 0]])
def test_no_samples_cost_nothing(offsets):
    empty = torch.zeros(0)
    assert distortion_loss(empty, empty, empty, torch.tensor(offsets)).item() == 0


def test_samples_of_other_length_are_refused():
    with pytest.raises(ShapeError, match="t_ends"):
        distortion_loss(torch.zeros(3), torch.zeros(3), torch.zeros(2), torch.tensor([0, 3]))


def test_opacity_entropy_is_largest_at_one_half_and_small_at_both_ends():
    assert opacity_entropy(torch.tensor([0.5])).item() == pytest.approx(math.log(2))
    assert opacity_entropy(torch.tensor([0.0, 1.0])).item() < 2e-4
    assert opacity_entropy(torch.zeros(0)).item() == 0
    opacity = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(opacity_entropy, (opacity,))
