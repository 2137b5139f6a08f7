"""MLP kernels on tensor cores, under the host emulation, against an oracle that rounds where the kernel rounds."""

from __future__ import annotations

import ctypes
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from posemap_fast.ops.reference.fused_mlp import fused_mlp, fused_mlp_gradients, joined_input, split_params
from posemap_fast.seeding import step_generator

NETWORKS = {
    "density": (32, 64, 16),
    "colour": (48, 64, 64, 3),
    "pose": (48, 64, 64),
    "linear": (3, 5),
    "odd": (1, 17, 33, 2),
    "wide": (200, 256, 250, 7),
    "deep": (16, 16, 16, 16, 16, 16, 16, 16, 16),
}
COUNTS = [1, 31, 33, 200]
CANARY = -7.25
BAD_ARGUMENT = 1


@dataclass
class Case:
    """Inputs of a network; `index` makes `extra` rows of rays."""

    x: torch.Tensor
    params: torch.Tensor
    dims: tuple[int, ...]
    extra: torch.Tensor | None = None
    index: torch.Tensor | None = None

    @property
    def reference(self) -> tuple[Any, ...]:
        extra = None if self.extra is None else self.extra.double()
        return self.x.double(), self.params.double(), self.dims, extra, self.index

    @property
    def extra_width(self) -> int:
        return 0 if self.extra is None else self.extra.shape[1]

    @property
    def extra_arguments(self) -> tuple[object, ...]:
        return self.extra, self.extra_width, self.index, 0 if self.extra is None else len(self.extra)


def make_case(dims: tuple[int, ...], n: int, extra: str = "none", layout: str = "rows", scale: float = 1.0) -> Case:
    g = step_generator(n, f"fused_mlp_cuda/{dims}/{extra}/{layout}")
    width = 0 if extra == "none" else min(19, dims[0] - 1)
    wide = torch.randn(n, dims[0] - width, generator=g) * scale
    if layout == "columns":
        wide = wide.t().contiguous().t()
    if layout == "strided":
        wide = torch.randn(n, 2 * wide.shape[1] + 1, generator=g)[:, : 2 * wide.shape[1] : 2]
    parts = [torch.randn(o * i, generator=g) * math.sqrt(2 / i) for i, o in itertools.pairwise(dims)]
    if extra == "none":
        return Case(wide, torch.cat(parts), dims)
    n_extra = n if extra == "rows" else n // 5 + 2
    rows = torch.randn(n_extra, width, generator=g)
    index = None if extra == "rows" else torch.randint(0, n_extra, (n,), generator=g).sort().values
    return Case(wide, torch.cat(parts), dims, rows, index)


def c_dims(dims: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(dims))(*dims)


def guarded(shape: tuple[int, ...], like: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of NaN between canaries, column-major if `like` is: (all, the middle)."""
    whole = torch.full((math.prod(shape) + 128,), CANARY)
    middle = whole[64:-64]
    by_column = like is not None and like.stride(0) == 1 and like.stride(1) != 1
    return whole, (middle.view(shape[::-1]).t() if by_column else middle.view(shape)).fill_(torch.nan)


def expect_canaries(whole: torch.Tensor) -> None:
    assert bool((whole[:64] == CANARY).all() and (whole[-64:] == CANARY).all())


def scratch(emulated: Any, case: Case) -> torch.Tensor:
    dims = case.dims
    query = "pmf_fused_mlp_cuda_scratch_bytes"
    return emulated.scratch(query, c_dims(dims), len(dims) - 1, len(case.x), case.extra_width)


def run_forward(emulated: Any, case: Case) -> torch.Tensor:
    x, dims = case.x, case.dims
    whole, out = guarded((len(x), dims[-1]))
    sizes = (c_dims(dims), len(dims) - 1, len(x))
    given = (x, x.stride(0), x.stride(1), *case.extra_arguments, case.params)
    emulated.call("pmf_fused_mlp_cuda_f32", *given, *sizes, out, scratch(emulated, case))
    expect_canaries(whole)
    return out


def run_backward(
    emulated: Any, case: Case, grad: torch.Tensor, wanted: tuple[bool, bool, bool] = (True, True, True)
) -> tuple[torch.Tensor | None, ...]:
    x, dims = case.x, case.dims
    shapes = [tuple(x.shape), (0,) if case.extra is None else tuple(case.extra.shape), (len(case.params),)]
    pairs = [guarded(shape, x if i == 0 else None) for i, shape in enumerate(shapes)]
    found = [pair[1] if want and pair[1].numel() else None for pair, want in zip(pairs, wanted, strict=True)]
    given = (grad, grad.stride(0), grad.stride(1), x, x.stride(0), x.stride(1), *case.extra_arguments, case.params)
    strides = pairs[0][1].stride()
    targets = (found[0], strides[0], strides[1], found[1], found[2])
    sizes = (c_dims(dims), len(dims) - 1, len(x))
    emulated.call("pmf_fused_mlp_backward_cuda_f32", *given, *sizes, *targets, scratch(emulated, case))
    for whole, _ in pairs:
        expect_canaries(whole)
    return tuple(found)


def half(value: torch.Tensor) -> torch.Tensor:
    return value.float().half().double()


def bfloat16(value: torch.Tensor) -> torch.Tensor:
    return value.float().bfloat16().double()


def quantised_activations(case: Case) -> list[torch.Tensor]:
    x, params, dims, extra, index = case.reference
    layers = [half(joined_input(x, extra, index))]
    for weight in split_params(half(params), dims)[:-1]:
        layers.append(half(torch.relu(layers[-1] @ weight.t())))
    return layers


def quantised_forward(case: Case) -> torch.Tensor:
    return quantised_activations(case)[-1] @ split_params(half(case.params), case.dims)[-1].t()


def quantised_backward(case: Case, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    activations, weights = quantised_activations(case), split_params(bfloat16(case.params), case.dims)
    z, found = bfloat16(grad), []
    for layer in reversed(range(len(weights))):
        found.append((z.t() @ bfloat16(activations[layer])).flatten())
        z = z @ weights[layer]
        if layer > 0:
            z = bfloat16(torch.where(activations[layer] <= 0, 0, z))
    width = case.x.shape[1]
    grad_x, grad_extra = z[:, :width], z[:, width:]
    if case.extra is None:
        return grad_x, None, torch.cat(found[::-1])
    if case.index is not None:
        grad_extra = torch.zeros_like(case.extra, dtype=torch.float64).index_add_(0, case.index, grad_extra)
    return grad_x, grad_extra, torch.cat(found[::-1])


def expect_close(got: torch.Tensor | None, want: torch.Tensor | None, what: str, unit: float) -> None:
    """Sums in another order may round a hidden number to its neighbour, `unit` away; nearly all must be closer."""
    assert got is not None and want is not None, what
    scale = max(float(want.abs().max()), 1e-30) if want.numel() else 1.0
    errors = (got.double() - want).abs() / scale
    assert bool(errors.isfinite().all()), what
    if errors.numel():
        assert float(errors.max()) < 2 * unit, what
        assert float(errors.flatten().quantile(0.5)) < unit / 16, what


HALF_UNIT, BFLOAT16_UNIT = 2.0**-11, 2.0**-8


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("extra", ["none", "rows", "rays"])
def test_outputs_are_those_of_the_rounded_network(emulated: Any, schedule: Any, extra: str, layout: str) -> None:
    for name, dims in NETWORKS.items():
        if extra != "none" and dims[0] < 2:
            continue
        for n in COUNTS if name in ("density", "odd") else [33]:
            case = make_case(dims, n, extra, layout)
            got = run_forward(emulated, case)
            expect_close(got, quantised_forward(case), f"{name}, {n} rows", HALF_UNIT)
            exact = fused_mlp(*case.reference)
            assert float((got - exact).abs().max() / exact.abs().max()) < 0.01, name


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("extra", ["none", "rows", "rays"])
def test_gradients_are_those_of_the_rounded_network(emulated: Any, schedule: Any, extra: str, layout: str) -> None:
    for name, dims in NETWORKS.items():
        if (extra != "none" and dims[0] < 2) or (name == "wide" and layout != "columns"):
            continue
        for n in COUNTS if name in ("density", "odd") else [33]:
            case = make_case(dims, n, extra, layout)
            grad = torch.randn(n, dims[-1], generator=step_generator(n, "fused_mlp_cuda/grad"))
            got, want = run_backward(emulated, case, grad), quantised_backward(case, grad)
            exact = fused_mlp_gradients(grad.double(), *case.reference)
            for part, found, expected, truth in zip(("x", "extra", "params"), got, want, exact, strict=True):
                if part == "extra" and extra == "none":
                    continue
                expect_close(found, expected, f"{part} of {name}, {n} rows", BFLOAT16_UNIT)
                assert found is not None and truth is not None
                # A hidden number near 0 may round to the other side of its gate: a whole term comes or goes.
                error = (found - truth).norm() / truth.norm().clamp(min=1e-30)
                assert float(error) < 0.1, f"{part} of {name}, {n} rows"


def test_many_tiles_go_round_the_grid(emulated: Any, schedule: Any) -> None:
    """700 rows in column-major storage; the emulated device has three processors."""
    case = make_case((6, 16, 4), 700, "rays", "columns")
    expect_close(run_forward(emulated, case), quantised_forward(case), "forward", HALF_UNIT)
    grad = torch.randn(4, generator=step_generator(0, "fused_mlp_cuda/expanded")).expand(700, 4)  # stride 0
    for got, want in zip(run_backward(emulated, case, grad), quantised_backward(case, grad), strict=True):
        expect_close(got, want, "backward", BFLOAT16_UNIT)
    many = make_case((2, 3), 2300)
    expect_close(run_forward(emulated, many), quantised_forward(many), "linear", HALF_UNIT)
    ones = torch.ones(2300, 3)
    for got, want in zip(run_backward(emulated, many, ones)[::2], quantised_backward(many, ones)[::2], strict=True):
        expect_close(got, want, "linear", BFLOAT16_UNIT)


@pytest.mark.parametrize("index", range(8))
def test_a_gradient_that_is_not_wanted_is_not_computed(emulated: Any, schedule: Any, index: int) -> None:
    wanted = (bool(index & 1), bool(index & 2), bool(index & 4))
    for extra in ("rows", "rays"):
        case = make_case((40, 24, 5), 70, extra)
        grad = torch.randn(70, 5, generator=step_generator(index, "fused_mlp_cuda/wanted"))
        want = quantised_backward(case, grad)
        for found, expected, want_it in zip(run_backward(emulated, case, grad, wanted), want, wanted, strict=True):
            assert (found is not None) == want_it
            if want_it:
                expect_close(found, expected, f"{extra} {index}", BFLOAT16_UNIT)


def test_small_gradients_do_not_underflow(emulated: Any, schedule: Any) -> None:
    """1e-12 is far below the smallest half (6e-8): bfloat16 keeps it."""
    case = make_case((32, 64, 16), 64)
    grad = torch.randn(64, 16, generator=step_generator(0, "fused_mlp_cuda/small")) * 1e-12
    got, want = run_backward(emulated, case, grad), quantised_backward(case, grad)
    for part in (0, 2):
        expect_close(got[part], want[part], "small", BFLOAT16_UNIT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_nan_and_inf_stay_in_their_row(emulated: Any, schedule: Any, value: float) -> None:
    case = make_case((20, 33, 5), 40, "rows")
    clean = run_forward(emulated, case)
    grad = torch.randn(40, 5, generator=step_generator(0, "fused_mlp_cuda/nan"))
    clean_grads = run_backward(emulated, case, grad, (True, True, False))
    others = torch.arange(40) != 17
    case.x[17, 0] = value
    spoiled = run_forward(emulated, case)
    assert torch.equal(spoiled[others], clean[others])
    assert not bool(spoiled[17].isfinite().all())  # 1e6 is beyond half: documented
    grads = run_backward(emulated, case, grad, (True, True, False))
    for got, want in zip(grads[:2], clean_grads[:2], strict=True):
        assert got is not None and want is not None
        assert torch.equal(got[others], want[others])


def test_no_rows(emulated: Any, schedule: Any) -> None:
    case = make_case((20, 33, 5), 0, "rays")
    assert run_forward(emulated, case).shape == (0, 5)
    _, grad_extra, grad_params = run_backward(emulated, case, torch.zeros(0, 5))
    assert grad_extra is not None and not bool(grad_extra.any())
    assert grad_params is not None and not bool(grad_params.any())


@pytest.mark.parametrize("dims", [(257, 3), (3, 257, 3), (3, 0), (2,) * 10])
def test_unsupported_widths_are_refused(emulated: Any, dims: tuple[int, ...]) -> None:
    x, out = torch.zeros(4, max(dims[0], 1)), torch.zeros(4, max(dims[-1], 1))
    assert emulated.size("pmf_fused_mlp_cuda_scratch_bytes", c_dims(dims), len(dims) - 1, 4, 0) == 0
    given = (x, dims[0], 1, None, 0, None, 0, torch.zeros(10), c_dims(dims), len(dims) - 1, 4, out, None)
    assert emulated.status("pmf_fused_mlp_cuda_f32", *given) == BAD_ARGUMENT
