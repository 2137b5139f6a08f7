"""Compositing, values: oracle, properties of light, edges. Gradients: test_composite_gradients.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.ops import _library
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops.composite import CompositeOutput, composite
from posemap_fast.ops.reference import composite as reference
from posemap_fast.seeding import step_generator

COUNTS = {
    "mixed": [0, 3, 1, 0, 0, 32, 33, 257, 600, 0],
    "one_ray": [5],
    "no_samples": [0, 0, 0],
    "no_rays": [],
    "many": [7, 0, 21] * 200,
}
CHANNELS = [0, 1, 3, 31, 32, 33, 64, 256]
Samples = dict[str, torch.Tensor]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: no C++ compiler on this machine")
    with _library.use_backend(request.param):
        yield request.param


def make_samples(counts: list[int], channels: int, dtype: torch.dtype = torch.float64, density: float = 3.0) -> Samples:
    """Sorted intervals with gaps between them, on rays with the given counts."""
    g = step_generator(len(counts), f"composite/{channels}")
    m = sum(counts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    borders = [draw(2 * c).sort().values.view(-1, 2) for c in counts]
    intervals = torch.cat(borders) if borders else torch.zeros(0, 2, dtype=torch.float64)
    values = {
        "sigmas": draw(m) * density,
        "t_starts": intervals[:, 0].contiguous(),
        "t_ends": intervals[:, 1].contiguous(),
        "rgbs": draw(m, 3),
        "features": draw(m, channels) * 2 - 1,
    }
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return {**{k: v.to(dtype) for k, v in values.items()}, "ray_offsets": offsets}


def oracle(samples: Samples, eps: float) -> CompositeOutput:
    doubles = {k: v if k == "ray_offsets" else v.double() for k, v in samples.items()}
    return CompositeOutput(*reference.composite(**doubles, early_stop_eps=eps))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize(("density", "eps"), [(3.0, 0.0), (300.0, 1e-4)], ids=["all", "early_stop"])
def test_native_equals_the_reference_in_float64(counts: list[int], channels: int, density: float, eps: float) -> None:
    samples = make_samples(counts, channels, density=density)
    for got, want in zip(composite(**samples, early_stop_eps=eps), oracle(samples, eps), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("density", [3.0, 100.0])
def test_float32_is_within_rounding_of_the_float64_oracle(channels: int, density: float, backend: str) -> None:
    """Up to 600 samples of magnitude 1 are added: 2e-6 is 17 units in the last place of the sum."""
    samples = make_samples(COUNTS["mixed"], channels, torch.float32, density)
    for got, want in zip(composite(**samples, early_stop_eps=0.0), oracle(samples, 0.0), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=2e-6)


def test_float32_exponential_is_exact_to_two_units_over_its_whole_range() -> None:
    """One sample per ray with tau from 1e-9 to 80: alpha is the weight; a second one behind it shows what passes."""
    taus = torch.logspace(-9, math.log10(80), 4001, dtype=torch.float64).float()
    sigmas = torch.stack([taus, torch.full_like(taus, torch.inf)], 1).flatten()
    ones = torch.ones_like(sigmas)
    offsets = torch.arange(0, len(sigmas) + 1, 2)
    weights = composite(sigmas, 0 * ones, ones, ones[:, None].expand(-1, 3), offsets, early_stop_eps=0.0).weights
    for got, want in ((weights[::2], -torch.expm1(-taus.double())), (weights[1::2], torch.exp(-taus.double()))):
        assert ((got.double() - want).abs() / want).max() < 2.5e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_weights_and_what_passes_sum_to_one(dtype: torch.dtype, backend: str) -> None:
    samples = make_samples(COUNTS["mixed"], 0, dtype)
    taus = (samples["sigmas"] * (samples["t_ends"] - samples["t_starts"])).double()
    total = torch.stack([part.sum() for part in taus.split(COUNTS["mixed"])])
    opacity = composite(**samples, early_stop_eps=0.0).opacity.double()
    torch.testing.assert_close(opacity + torch.exp(-total), torch.ones_like(total), rtol=0, atol=3e-6)


def test_homogeneous_slab_absorbs_one_minus_exp_of_its_thickness(backend: str) -> None:
    t = torch.linspace(0.2, 1.7, 41, dtype=torch.float64)
    sigmas, rgbs = torch.full((40,), 2.0, dtype=torch.float64), torch.ones(40, 3, dtype=torch.float64)
    out = composite(sigmas, t[:-1], t[1:], rgbs, torch.tensor([0, 40]), early_stop_eps=0.0)
    assert float(out.opacity[0]) == pytest.approx(1 - math.exp(-2.0 * 1.5), abs=1e-14)


def test_the_worked_example_of_the_docstring(backend: str) -> None:
    """Empty first, then half absorbed: weight is T before the sample, not after it (that would be 0.25)."""
    t = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    sigmas = torch.tensor([0, math.log(2), math.log(2)], dtype=torch.float64)
    out = composite(sigmas, t[:-1], t[1:], torch.eye(3, dtype=torch.float64), torch.tensor([0, 3]))
    want = torch.tensor([0, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(out.weights, want)
    torch.testing.assert_close(out.rgb[0], want)
    assert float(out.depth[0]) == pytest.approx(0.5 * 1.5 + 0.25 * 2.5)


def test_splitting_an_interval_of_constant_density_changes_nothing(backend: str) -> None:
    samples = make_samples([9, 4], 5)
    halves = {k: v.repeat_interleave(2, 0) for k, v in samples.items() if k != "ray_offsets"}
    middle = (samples["t_starts"] + samples["t_ends"]) / 2
    halves["t_starts"][1::2], halves["t_ends"][::2] = middle, middle
    whole = composite(**samples, early_stop_eps=0.0)
    split = composite(**halves, ray_offsets=samples["ray_offsets"] * 2, early_stop_eps=0.0)
    for name in ("rgb", "opacity", "features"):
        torch.testing.assert_close(getattr(split, name), getattr(whole, name), rtol=0, atol=1e-13)
    torch.testing.assert_close(split.weights.view(-1, 2).sum(1), whole.weights, rtol=0, atol=1e-13)


def test_shuffling_rays_permutes_outputs_bit_for_bit(backend: str) -> None:
    counts = COUNTS["mixed"]
    samples = make_samples(counts, 33, torch.float32)
    order = torch.randperm(len(counts), generator=step_generator(0, "shuffle")).tolist()
    moved = {k: torch.cat([v.split(counts)[r] for r in order]) for k, v in samples.items() if k != "ray_offsets"}
    offsets = torch.tensor([0, *(counts[r] for r in order)]).cumsum(0)
    first, second = composite(**samples), composite(**moved, ray_offsets=offsets)
    for name in ("rgb", "depth", "opacity"):
        assert torch.equal(getattr(first, name)[order], getattr(second, name))
    # index_add of the reference may add a row's channels in another order: rounding only.
    torch.testing.assert_close(first.features[order], second.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_samples_behind_the_early_stop_weigh_nothing(dtype: torch.dtype, backend: str) -> None:
    """Each sample lets a tenth pass: T = 1, .1, .01, .001 ..."""
    t = torch.arange(7, dtype=dtype)
    inputs = (torch.full((6,), math.log(10), dtype=dtype), t[:-1], t[1:], torch.ones(6, 3, dtype=dtype))
    for eps, kept in ((0.0, 6), (0.05, 2), (0.005, 3), (0.9, 1)):
        out = composite(*inputs, torch.tensor([0, 6]), torch.ones(6, 2, dtype=dtype), early_stop_eps=eps)
        want = torch.tensor([0.9 * 10.0**-i if i < kept else 0 for i in range(6)], dtype=dtype)
        torch.testing.assert_close(out.weights, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(out.features[0], want.sum().expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("sigma", [1e4, 1e30, math.inf])
def test_huge_density_is_a_wall(sigma: float, dtype: torch.dtype, backend: str) -> None:
    samples = make_samples([4], 2, dtype)
    samples["sigmas"][1] = sigma
    out = composite(**samples)
    assert out.weights.isfinite().all() and float(out.opacity) == pytest.approx(1.0, abs=1e-6)
    assert out.weights[2:].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_nan_density_stays_on_its_ray(dtype: torch.dtype, backend: str) -> None:
    counts = [40, 40, 0, 40]
    samples = make_samples(counts, 3, dtype)
    clean = composite(**samples)
    samples["sigmas"][45] = math.nan
    out = composite(**samples)
    for got, want in ((out.rgb, clean.rgb), (out.features, clean.features), (out.depth, clean.depth)):
        assert torch.equal(got[[0, 2, 3]], want[[0, 2, 3]]) and got[1].isnan().all()


def test_empty_rays_give_zeros(backend: str) -> None:
    out = composite(**make_samples([0, 2, 0], 4))
    for value in out[:4]:
        assert (value[[0, 2]] == 0).all()


def test_strided_inputs_give_the_same_bits(backend: str) -> None:
    samples = make_samples(COUNTS["many"], 33, torch.float32)
    plain = composite(**samples)
    for pad in (lambda v: torch.stack([v, v], -1)[..., 0], lambda v: torch.cat([v, v], -1)[..., : v.shape[-1]]):
        strided = {k: pad(v) for k, v in samples.items()}
        assert all(torch.equal(a, b) for a, b in zip(composite(**strided), plain, strict=True))


def test_compositing_repeats_bit_for_bit_with_any_number_of_threads() -> None:
    samples = make_samples(COUNTS["many"], 64, torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (2, 2, 1):
            torch.set_num_threads(n)
            results.append(composite(**samples))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_packed_form_agrees_with_the_oracle() -> None:
    """The benchmark's peer computes the same thing, so its time is worth comparing with."""
    samples = make_samples(COUNTS["mixed"], 8, torch.float32)
    for got, want in zip(reference.composite_packed(**samples), oracle(samples, 0.0), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [0, 5, 32])
def test_outputs_are_written_in_bounds(channels: int) -> None:
    """Sentinels around every output buffer survive."""
    if _library.cpu_library() is None:
        pytest.skip("no native library")
    samples = make_samples(COUNTS["mixed"], channels, torch.float32)
    want = composite(**samples)
    buffers = [torch.full((v.numel() + 32,), -7.0) for v in want]
    sizes = (len(want.depth), len(want.weights), channels, channels, 1e-4)
    inputs = (samples[k] for k in ("sigmas", "t_starts", "t_ends", "rgbs", "features", "ray_offsets"))
    cpu_face().run("pmf_composite_cpu_f32", torch.empty(0), *inputs, *(b[16:] for b in buffers), *sizes)
    for buffer, value in zip(buffers, want, strict=True):
        assert torch.equal(buffer[16:-16], value.flatten())
        assert (buffer[:16] == -7).all() and (buffer[-16:] == -7).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigmas": torch.zeros(5, 1)}, "sigmas must have shape"),
        ({"sigmas": torch.zeros(5, dtype=torch.float16)}, "sigmas must be torch.float32 or torch.float64"),
        ({"t_starts": torch.zeros(4)}, "t_starts must have shape"),
        ({"t_ends": torch.zeros(5, dtype=torch.float64)}, "t_ends must be torch.float32"),
        ({"rgbs": torch.zeros(5, 4)}, "rgbs must have shape"),
        ({"features": torch.zeros(4, 2)}, "features must have shape"),
        ({"features": torch.zeros(5, 2, device="meta")}, "on one device"),
        ({"ray_offsets": torch.tensor([0, 2, 5], dtype=torch.int32)}, "ray_offsets must be torch.int64"),
        ({"ray_offsets": torch.tensor([0, 4, 3, 5])}, "must not decrease"),
        ({"ray_offsets": torch.tensor([0, 9, 5])}, "must not decrease"),
        ({"ray_offsets": torch.tensor([0, 2, 6])}, "must run from 0 to 5 samples; got 0 to 6"),
        ({"ray_offsets": torch.tensor([1, 2, 5])}, "must run from 0 to 5 samples; got 1 to 5"),
        ({"ray_offsets": torch.tensor([], dtype=torch.int64)}, "n_rays \\+ 1 entries"),
    ],
)
def test_wrong_inputs_are_named(change: Samples, message: str, backend: str) -> None:
    samples = {**make_samples([2, 3], 2, torch.float32), **change}
    with pytest.raises(ShapeError, match=f"composite: .*{message}"):
        composite(**samples)
