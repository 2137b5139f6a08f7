"""Selection of packed samples: thresholds, packing, edges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.ops import _library
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops.compact import compact
from posemap_fast.ops.composite import composite
from posemap_fast.ops.reference import compact as reference
from posemap_fast.seeding import step_generator

COUNTS = {
    "mixed": [0, 3, 1, 0, 0, 32, 300, 0],
    "one_ray": [5],
    "no_samples": [0, 0],
    "no_rays": [],
    "many": [9, 0, 30] * 300,
}
Samples = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: no C++ compiler on this machine")
    with _library.use_backend(request.param):
        yield request.param


def make_samples(counts: list[int], dtype: torch.dtype = torch.float64) -> Samples:
    g, m = step_generator(len(counts), "compact"), sum(counts)
    sigmas = 60 * torch.rand(m, generator=g, dtype=torch.float64) ** 3
    t_starts = torch.rand(m, generator=g, dtype=torch.float64)
    t_ends = t_starts + torch.rand(m, generator=g, dtype=torch.float64) / 10
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return sigmas.to(dtype), t_starts.to(dtype), t_ends.to(dtype), offsets


def steps(*taus: float) -> Samples:
    """One ray with the given optical depths."""
    t = torch.arange(len(taus) + 1, dtype=torch.float64)
    return torch.tensor(taus, dtype=torch.float64), t[:-1], t[1:], torch.tensor([0, len(taus)])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("eps", [(1e-3, 0.0), (0.2, 0.05), (0.0, 0.0)])
def test_native_equals_the_reference(counts: list[int], eps: tuple[float, float]) -> None:
    samples = make_samples(counts)
    got, want = compact(*samples, *eps), reference.compact(*samples, *eps)
    assert torch.equal(got.indices, want[0]) and torch.equal(got.ray_offsets, want[1])


def test_float32_selects_what_float64_selects(backend: str) -> None:
    """The drawn samples keep clear of the thresholds by more than a rounding."""
    single = make_samples(COUNTS["mixed"], torch.float32)
    want = reference.compact(*(v.double() for v in single[:3]), single[3], 1e-3, 0.01)
    got = compact(*single, 1e-3, 0.01)
    assert torch.equal(got.indices, want[0]) and torch.equal(got.ray_offsets, want[1])


def test_the_worked_example_of_the_docstring(backend: str) -> None:
    got = compact(*steps(0, 9, 9, 9))
    assert got.indices.tolist() == [0, 1] and got.ray_offsets.tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_a_sample_exactly_at_a_threshold_is_kept(dtype: torch.dtype, backend: str) -> None:
    """T before the second sample is exactly exp(-0) = 1, alpha of an infinite density exactly 1."""
    sigmas, t_starts, t_ends, offsets = (v.to(dtype) if v.is_floating_point() else v for v in steps(0, math.inf, 1))
    assert compact(sigmas, t_starts, t_ends, offsets, 1.0, 0.0).indices.tolist() == [0, 1]
    assert compact(sigmas, t_starts, t_ends, offsets, 0.5, 1.0).indices.tolist() == [1]


def test_transmittance_counts_dropped_samples_too(backend: str) -> None:
    """Twenty thin samples are dropped for their alpha, yet together they hide the last one."""
    samples = steps(*([0.1] * 20), 5)
    assert compact(*samples, transmittance_eps=0.2, alpha_eps=0.5).indices.tolist() == []
    assert compact(*samples, transmittance_eps=0.1, alpha_eps=0.5).indices.tolist() == [20]


def test_kept_samples_belong_to_the_rays_they_came_from(backend: str) -> None:
    samples = make_samples(COUNTS["many"])
    got = compact(*samples, 0.1, 0.02)
    before = torch.arange(len(COUNTS["many"])).repeat_interleave(samples[3].diff())[got.indices]
    after = torch.arange(len(COUNTS["many"])).repeat_interleave(got.ray_offsets.diff())
    assert torch.equal(before, after) and (got.indices.diff() > 0).all()


def test_compositing_the_kept_samples_changes_nothing_at_the_same_threshold(backend: str) -> None:
    sigmas, t_starts, t_ends, offsets = make_samples(COUNTS["mixed"])
    rgbs = torch.rand(len(sigmas), 3, generator=step_generator(0, "rgbs"), dtype=torch.float64)
    whole = composite(sigmas, t_starts, t_ends, rgbs, offsets, early_stop_eps=1e-2)
    kept = compact(sigmas, t_starts, t_ends, offsets, transmittance_eps=1e-2)
    i = kept.indices
    less = composite(sigmas[i], t_starts[i], t_ends[i], rgbs[i], kept.ray_offsets, early_stop_eps=1e-2)
    assert len(i) < len(sigmas)
    torch.testing.assert_close(less.rgb, whole.rgb, rtol=0, atol=1e-14)


def test_zero_thresholds_keep_everything_even_nan(backend: str) -> None:
    got = compact(*steps(1, math.nan, 1), 0.0, 0.0)
    assert got.indices.tolist() == [0, 1, 2]
    hidden = make_samples([30, 30, 30])
    clean = compact(*hidden)
    hidden[0][35] = math.nan
    spoiled = compact(*hidden)
    assert torch.equal(clean.ray_offsets.diff()[[0, 2]], spoiled.ray_offsets.diff()[[0, 2]])


def test_strided_inputs_and_repeats_give_the_same_indices(backend: str) -> None:
    samples = make_samples(COUNTS["many"], torch.float32)
    strided = tuple(torch.stack([v, v], -1)[..., 0] for v in samples)
    first = compact(*samples)
    for other in (compact(*samples), compact(*strided)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_indices_are_written_in_bounds() -> None:
    """Sentinels around the index and mask buffers survive."""
    if _library.cpu_library() is None:
        pytest.skip("no native library")
    sigmas, t_starts, t_ends, offsets = make_samples(COUNTS["mixed"])
    want = compact(sigmas, t_starts, t_ends, offsets)
    mask = torch.full((len(sigmas) + 16,), 77, dtype=torch.uint8)
    kept_offsets = torch.full((len(offsets) + 16,), -7)
    indices = torch.full((len(want.indices) + 16,), -7)
    sizes = (len(offsets) - 1, len(sigmas))
    fixed = (sigmas, t_starts, t_ends, offsets, mask[8:], kept_offsets[8:])
    cpu_face().run("pmf_compact_count_cpu_f64", torch.empty(0), *fixed, *sizes, 1e-3, 0.0)
    cpu_face().run("pmf_compact_fill_cpu", torch.empty(0), offsets, mask[8:], kept_offsets[8:], indices[8:], *sizes)
    assert torch.equal(indices[8:-8], want.indices) and torch.equal(kept_offsets[8:-8], want.ray_offsets)
    for buffer, sentinel in ((mask, 77), (kept_offsets, -7), (indices, -7)):
        assert (buffer[:8] == sentinel).all() and (buffer[-8:] == sentinel).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(5, 1)}, "sigmas must have shape"),
        ({0: torch.zeros(5, dtype=torch.int64)}, "sigmas must be torch.float32 or torch.float64"),
        ({1: torch.zeros(4)}, "t_starts must have shape"),
        ({2: torch.zeros(5, dtype=torch.float64)}, "t_ends must be torch.float32"),
        ({2: torch.zeros(5, device="meta")}, "on one device"),
        ({3: torch.tensor([0, 6, 5])}, "must not decrease"),
        ({3: torch.tensor([0, 7])}, "must run from 0 to 5 samples; got 0 to 7"),
        ({0: torch.zeros(5, requires_grad=True)}, "no gradient"),
    ],
)
def test_wrong_inputs_are_named(change: dict[int, torch.Tensor], message: str, backend: str) -> None:
    samples = make_samples([2, 3], torch.float32)
    with pytest.raises(ShapeError, match=f"compact: .*{message}"):
        compact(*(change.get(i, v) for i, v in enumerate(samples)))


def test_registration_passes_opcheck(backend: str) -> None:
    arguments = (*make_samples([3, 0, 8]), 0.1, 0.01)
    torch.library.opcheck(torch.ops.posemap_fast.compact.default, arguments)
