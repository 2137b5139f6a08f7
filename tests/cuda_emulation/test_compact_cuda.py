"""Selection of packed samples under the host emulation against the oracle."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from posemap_fast.ops.reference import compact as reference
from posemap_fast.seeding import step_generator

from .guarded import Guarded

COUNTS = {
    "mixed": [0, 3, 1, 0, 0, 31, 32, 33, 130, 0],
    "one_ray": [5],
    "one_sample": [1],
    "no_samples": [0, 0],
    "no_rays": [],
    "blocks": [9, 0, 40] * 20,  # a block takes 8 rays
}
Samples = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make_samples(counts: list[int], dtype: torch.dtype = torch.float64) -> Samples:
    g, m = step_generator(len(counts), "compact_cuda"), sum(counts)
    sigmas = 60 * torch.rand(m, generator=g, dtype=torch.float64) ** 3
    t_starts = torch.rand(m, generator=g, dtype=torch.float64)
    t_ends = t_starts + torch.rand(m, generator=g, dtype=torch.float64) / 10
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return sigmas.to(dtype), t_starts.to(dtype), t_ends.to(dtype), offsets


def one_ray(taus: list[float]) -> Samples:
    t_starts = torch.zeros(len(taus), dtype=torch.float64)
    return torch.tensor(taus, dtype=torch.float64), t_starts, t_starts + 1, torch.tensor([0, len(taus)])


def compact(emulated: Any, samples: Samples, *eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    n_rays, n_samples = len(samples[3]) - 1, len(samples[0])
    memory = Guarded()
    mask = memory.new(n_samples, dtype=torch.uint8)
    kept_offsets = memory.new(n_rays + 1, dtype=torch.int64)
    suffix = "f32" if samples[0].dtype == torch.float32 else "f64"
    scratch = emulated.scratch("pmf_scan_scratch_bytes", n_rays)
    count = f"pmf_compact_count_cuda_{suffix}"
    emulated.call(count, *samples, mask, kept_offsets, n_rays, n_samples, *eps, scratch)
    indices = memory.new(int(kept_offsets[-1]), dtype=torch.int64)
    emulated.call("pmf_compact_fill_cuda", samples[3], mask, kept_offsets, indices, n_rays, n_samples)
    memory.expect_clean_margins()
    assert torch.equal(mask.nonzero()[:, 0], indices) and bool((mask <= 1).all())
    return indices, kept_offsets


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("eps", [(1e-3, 0.0), (0.2, 0.05), (0.0, 0.0)])
def test_float64_equals_the_oracle(emulated: Any, schedule: Any, counts: list[int], eps: tuple[float, float]) -> None:
    samples = make_samples(counts)
    got, want = compact(emulated, samples, *eps), reference.compact(*samples, *eps)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_float32_selects_what_float64_selects(emulated: Any, schedule: Any, counts: list[int]) -> None:
    """The drawn samples keep clear of the thresholds by more than a rounding."""
    single = make_samples(counts, torch.float32)
    sigmas, t_starts, t_ends, offsets = single
    want = reference.compact(sigmas.double(), t_starts.double(), t_ends.double(), offsets, 1e-3, 0.01)
    got = compact(emulated, single, 1e-3, 0.01)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_transmittance_is_multiplied_in_the_order_of_the_samples(emulated: Any, schedule: Any) -> None:
    """With the k-th transmittance of a sequential walk as threshold, bit for bit, exactly samples 0 to k are kept."""
    sigmas = (torch.rand(80, generator=step_generator(0, "sequential"), dtype=torch.float64) / 5 + 1e-3).tolist()
    transmittance = [1.0]
    for sigma in sigmas:
        transmittance.append(transmittance[-1] * math.exp(-sigma))
    for k in (0, 1, 7, 30, 31, 32, 33, 63, 64, 79):
        assert compact(emulated, one_ray(sigmas), transmittance[k], 0.0)[0].tolist() == list(range(k + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_sample_exactly_at_a_threshold_is_kept(emulated: Any, schedule: Any, dtype: torch.dtype) -> None:
    """T before the second sample is exactly exp(-0) = 1, alpha of an infinite density exactly 1."""
    sigmas, t_starts, t_ends, offsets = one_ray([0, math.inf, 1])
    samples = (sigmas.to(dtype), t_starts.to(dtype), t_ends.to(dtype), offsets)
    assert compact(emulated, samples, 1.0, 0.0)[0].tolist() == [0, 1]
    assert compact(emulated, samples, 0.5, 1.0)[0].tolist() == [1]


def test_dropped_samples_count_in_the_transmittance(emulated: Any, schedule: Any) -> None:
    samples = one_ray([0.1] * 40 + [5])
    assert compact(emulated, samples, math.exp(-3.9), 0.5)[0].tolist() == []
    assert compact(emulated, samples, math.exp(-4.1), 0.5)[0].tolist() == [40]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_nan_is_kept_with_all_behind_it_on_its_ray_only(emulated: Any, schedule: Any, dtype: torch.dtype) -> None:
    samples = make_samples([40, 70, 40], dtype)
    clean = compact(emulated, samples, 0.5, 0.0)
    samples[0][45] = torch.nan
    indices, offsets = compact(emulated, samples, 0.5, 0.0)
    assert torch.equal(offsets.diff()[[0, 2]], clean[1].diff()[[0, 2]])
    behind = indices[(indices > 45) & (indices < 110)]
    assert behind.tolist() == list(range(46, 110))


def test_more_rays_than_one_tile_of_the_scan(emulated: Any, schedule: Any) -> None:
    counts = ([3] + [0] * 60) * 70  # 4270 rays
    samples = make_samples(counts)
    got, want = compact(emulated, samples, 0.2, 0.05), reference.compact(*samples, 0.2, 0.05)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
