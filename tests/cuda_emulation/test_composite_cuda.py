"""Compositing kernels under the host emulation against the oracle in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from posemap_fast.ops.reference import composite as reference
from posemap_fast.seeding import step_generator

COUNTS = {
    "mixed": [0, 3, 1, 0, 31, 32, 33, 70, 0],
    "one_ray": [5],
    "no_samples": [0, 0, 0],
    "no_rays": [],
    "many": [7, 0, 21] * 8,
}
CHANNELS = [0, 1, 3, 31, 32, 33, 64, 256]
CASES = [(c, torch.float64) for c in CHANNELS] + [(c, torch.float32) for c in (0, 33, 64)]
OUTPUTS = ("rgb", "depth", "opacity", "features", "weights")
INPUTS = ("sigmas", "t_starts", "t_ends", "rgbs", "features")
CANARY = -7.25
Samples = dict[str, torch.Tensor]


def make_samples(counts: list[int], channels: int, density: float, dtype: torch.dtype) -> Samples:
    """Sorted intervals with gaps; feature rows are 5 values apart from each other."""
    g = step_generator(len(counts), f"composite_cuda/{channels}")
    m = sum(counts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    borders = [draw(2 * c).sort().values.view(-1, 2) for c in counts]
    intervals = torch.cat(borders) if borders else torch.zeros(0, 2, dtype=torch.float64)
    storage = (draw(m, channels + 5) * 2 - 1).to(dtype)
    return {
        "sigmas": (draw(m) * density).to(dtype),
        "t_starts": intervals[:, 0].contiguous().to(dtype),
        "t_ends": intervals[:, 1].contiguous().to(dtype),
        "rgbs": draw(m, 3).to(dtype),
        "features": storage[:, :channels],
        "ray_offsets": torch.tensor([0, *counts]).cumsum(0),
    }


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN between two rows of canaries: (all, the middle)."""
    whole = torch.full((math.prod(shape) + 128,), CANARY, dtype=dtype)
    middle = whole[64:-64].view(shape)
    return whole, middle.fill_(torch.nan)


def expect_canaries(wholes: list[torch.Tensor]) -> None:
    for whole in wholes:
        assert bool((whole[:64] == CANARY).all() and (whole[-64:] == CANARY).all())


def shapes(s: Samples) -> list[tuple[int, ...]]:
    n, m, c = len(s["ray_offsets"]) - 1, len(s["sigmas"]), s["features"].shape[1]
    return [(n, 3), (n,), (n,), (n, c), (m,)]


def sizes(s: Samples) -> tuple[int, int, int, int]:
    return len(s["ray_offsets"]) - 1, *s["features"].shape, s["features"].shape[1] + 5


def suffix(s: Samples) -> str:
    return "f32" if s["sigmas"].dtype == torch.float32 else "f64"


def run_forward(emulated: Any, s: Samples, eps: float) -> list[torch.Tensor]:
    pairs = [guarded(shape, s["sigmas"].dtype) for shape in shapes(s)]
    inputs = [s[name] for name in INPUTS]
    emulated.call(f"pmf_composite_cuda_{suffix(s)}", *inputs, s["ray_offsets"], *(p[1] for p in pairs), *sizes(s), eps)
    expect_canaries([whole for whole, _ in pairs])
    return [middle for _, middle in pairs]


def run_backward(
    emulated: Any,
    s: Samples,
    weights: torch.Tensor,
    cotangents: list[torch.Tensor | None],
    wanted: list[bool],
    eps: float,
) -> list[torch.Tensor | None]:
    dtype = s["sigmas"].dtype
    pairs = [guarded(tuple(s[k].shape), dtype) if want else None for k, want in zip(INPUTS, wanted, strict=True)]
    grads = [None if p is None else p[1] for p in pairs]
    inputs = [s[name] for name in INPUTS]
    function = f"pmf_composite_backward_cuda_{suffix(s)}"
    emulated.call(function, *inputs, s["ray_offsets"], weights, *cotangents, *grads, *sizes(s), eps)
    expect_canaries([p[0] for p in pairs if p is not None])
    return grads


def oracle_inputs(s: Samples, eps: float) -> tuple[Any, ...]:
    return *(s[name].double() for name in INPUTS), s["ray_offsets"], eps


def make_cotangents(s: Samples) -> list[torch.Tensor]:
    g = step_generator(1, "composite_cuda/cotangents")
    return [torch.randn(*shape, generator=g, dtype=torch.float64).to(s["sigmas"].dtype) for shape in shapes(s)]


def expect_close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    tight = got.dtype == torch.float64
    scale = float(want.abs().max()) if want.numel() else 1.0
    tolerance = (1e-12 if tight else 3e-6) * max(scale, 1.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize(("density", "eps"), [(3.0, 0.0), (300.0, 1e-4)], ids=["all", "early_stop"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_every_output_equals_the_oracle(
    emulated: Any, schedule: Any, counts: list[int], density: float, eps: float
) -> None:
    for channels, dtype in CASES:
        s = make_samples(counts, channels, density, dtype)
        want = reference.composite(*oracle_inputs(s, eps))
        for name, got, expected in zip(OUTPUTS, run_forward(emulated, s, eps), want, strict=True):
            expect_close(got, expected, f"{name}, {channels} channels")


@pytest.mark.parametrize(("density", "eps"), [(3.0, 0.0), (300.0, 1e-4)], ids=["all", "early_stop"])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_every_gradient_equals_the_oracle(
    emulated: Any, schedule: Any, counts: list[int], density: float, eps: float
) -> None:
    for channels, dtype in CASES:
        s = make_samples(counts, channels, density, dtype)
        cotangents = make_cotangents(s)
        weights = reference.composite(*oracle_inputs(s, eps))[4].to(dtype)
        want = reference.composite_backward([c.double() for c in cotangents], *oracle_inputs(s, eps))
        got = run_backward(emulated, s, weights, [*cotangents], [True] * 5, eps)
        for name, grad, expected in zip(INPUTS, got, want, strict=True):
            assert grad is not None
            expect_close(grad, expected, f"{name}, {channels} channels")


@pytest.mark.parametrize("channels", [0, 3, 33])
def test_any_cotangent_and_any_gradient_may_be_missing(emulated: Any, schedule: Any, channels: int) -> None:
    s = make_samples([0, 3, 33], channels, 30.0, torch.float64)
    given = make_cotangents(s)
    weights = reference.composite(*oracle_inputs(s, 1e-3))[4]
    for kept, wanted in itertools.product(
        itertools.product((True, False), repeat=5),
        ((1, 1, 1, 1, 1), (0, 0, 0, 1, 1), (1, 0, 0, 0, 0), (1, 1, 0, 0, 1), (0, 0, 0, 0, 1)),
    ):
        cotangents = [c if keep else None for c, keep in zip(given, kept, strict=True)]
        # As `ops.composite` does: colours and features have a gradient through the output that sums them only.
        flags = [bool(w) for w in wanted]
        flags[3], flags[4] = flags[3] and kept[0], flags[4] and kept[3]
        want = reference.composite_backward(cotangents, *oracle_inputs(s, 1e-3))
        got = run_backward(emulated, s, weights, cotangents, flags, 1e-3)
        for name, grad, expected in zip(INPUTS, got, want, strict=True):
            if grad is not None:
                expect_close(grad, expected, name)


@pytest.mark.parametrize("name", ["sigmas", "rgbs", "features"])
def test_nan_stays_on_its_ray(emulated: Any, schedule: Any, name: str) -> None:
    s = make_samples(COUNTS["mixed"], 33, 3.0, torch.float32)
    clean = run_forward(emulated, s, 1e-4)
    ray, first = 6, int(s["ray_offsets"][6])
    bad = {
        **s,
        name: s[name].clone() if name != "features" else s[name].new_empty(len(s[name]), 38)[:, :33].copy_(s[name]),
    }
    bad[name][first + 2] = torch.nan
    spoiled = run_forward(emulated, bad, 1e-4)
    others = torch.arange(len(s["ray_offsets"]) - 1) != ray
    for got, want in zip(spoiled[:4], clean[:4], strict=True):
        assert torch.equal(got[others], want[others])
    assert bool(spoiled[{"sigmas": 2, "rgbs": 0, "features": 3}[name]][ray].isnan().any())
    assert torch.equal(spoiled[4][: first + 2], clean[4][: first + 2])
    grads = run_backward(emulated, bad, spoiled[4], [*make_cotangents(s)], [True] * 5, 1e-4)
    rays = reference.ray_indices(s["ray_offsets"])
    for grad in grads:
        assert grad is not None and bool(grad[rays != ray].isfinite().all())


def test_what_lies_behind_the_early_stop_is_not_read(emulated: Any, schedule: Any) -> None:
    """NaN colours and densities behind an opaque sample, in its chunk of 32 and in later ones."""
    s = make_samples([100, 4], 3, 3.0, torch.float32)
    s["sigmas"][10] = 1e9
    for name in INPUTS:
        s[name][11:100] = torch.nan
    outputs = run_forward(emulated, s, 1e-4)
    assert all(bool(o.isfinite().all()) for o in outputs)
    assert float(outputs[2][0]) == pytest.approx(1.0, abs=1e-6)
    for grad in run_backward(emulated, s, outputs[4], [*make_cotangents(s)], [True] * 5, 1e-4):
        assert grad is not None and bool(grad.isfinite().all()) and not bool(grad[11:100].any())


def test_transmittance_exactly_at_the_threshold_is_kept(emulated: Any, schedule: Any) -> None:
    """Each sample lets a half pass; T_i < eps stops, T_i == eps does not."""
    n = 40
    s = {
        "sigmas": torch.full((n,), math.log(2), dtype=torch.float64),
        "t_starts": torch.zeros(n, dtype=torch.float64),
        "t_ends": torch.ones(n, dtype=torch.float64),
        "rgbs": torch.ones(n, 3, dtype=torch.float64),
        "features": torch.ones(n, 6, dtype=torch.float64)[:, :1],
        "ray_offsets": torch.tensor([0, n]),
    }
    for kept in (1, 5, 31, 32, 33, 39):
        weights = run_forward(emulated, s, 0.5**kept * 1.5)[4]
        assert int((weights > 0).sum()) == kept
