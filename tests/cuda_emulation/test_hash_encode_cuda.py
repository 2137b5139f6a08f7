"""Hash grid kernels under the host emulation against the oracle in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from posemap_fast.ops.hash_encode import HashGridSpec
from posemap_fast.ops.reference import hash_encode as reference
from posemap_fast.seeding import step_generator

from .guarded import Guarded

# A level of up to 48 KB gets its gradient through shared memory, a larger one directly.
SPECS = {
    "dense_small": HashGridSpec(3, 2, 19, 4, 12),
    "dense_large": HashGridSpec(2, 4, 19, 16, 20),
    "small_and_large": HashGridSpec(6, 2, 13, 4, 64),
    "one_feature": HashGridSpec(4, 1, 10, 4, 64),
    "four_features": HashGridSpec(4, 4, 10, 4, 64),
    "eight_features": HashGridSpec(4, 8, 12, 4, 64),
    "collisions": HashGridSpec(3, 2, 3, 16, 100),  # 8 rows per level
    "one_level": HashGridSpec(1, 2, 10, 5, 5),
    "base_one": HashGridSpec(3, 2, 3, 1, 8),
}
COUNTS = [1, 31, 32, 33, 300]
HOSTILE = [0.0, 1.0, -0.0, -1e-9, 1 + 1e-9, -3.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan"), 0.37]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, HashGridSpec]  # x, table, grad (n_levels * F, n), spec


def draw(spec: HashGridSpec, n: int, dtype: torch.dtype = torch.float64) -> Case:
    g = step_generator(n, f"hash_encode_cuda/{spec.output_dim}/{spec.n_entries}")
    x = torch.rand(n, 3, generator=g, dtype=torch.float64)
    table = torch.randn(spec.n_entries, spec.n_features_per_level, generator=g, dtype=torch.float64)
    grad = torch.randn(spec.output_dim, n, generator=g, dtype=torch.float64)
    return x.to(dtype), table.to(dtype), grad.to(dtype), spec


def suffix(x: torch.Tensor) -> str:
    return "f32" if x.dtype == torch.float32 else "f64"


def encode(emulated: Any, x: torch.Tensor, table: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    memory = Guarded()
    out = memory.new(spec.output_dim, len(x), dtype=x.dtype)
    name = "f16table_f32" if table.dtype == torch.float16 else suffix(x)
    emulated.call(f"pmf_hash_encode_cuda_{name}", x, len(x), table, *spec.native_arguments, out)
    memory.expect_clean_margins()
    return out.t()


def table_gradient(emulated: Any, x: torch.Tensor, grad: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    memory = Guarded()
    out = memory.new(spec.n_entries, spec.n_features_per_level, dtype=x.dtype)
    function = f"pmf_hash_encode_backward_table_cuda_{suffix(x)}"
    emulated.call(function, x, len(x), grad, *spec.native_arguments, out)
    memory.expect_clean_margins()
    return out


def input_gradient(
    emulated: Any, x: torch.Tensor, table: torch.Tensor, grad: torch.Tensor, spec: HashGridSpec
) -> torch.Tensor:
    memory = Guarded()
    out = memory.new(len(x), 3, dtype=x.dtype)
    function = f"pmf_hash_encode_backward_x_cuda_{suffix(x)}"
    emulated.call(function, x, len(x), grad, table, *spec.native_arguments, out)
    memory.expect_clean_margins()
    return out


def run_all(emulated: Any, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, table, grad, spec = case
    return (
        encode(emulated, x, table, spec),
        table_gradient(emulated, x, grad, spec),
        input_gradient(emulated, x, table, grad, spec),
    )


def oracle(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, table, grad = (t.double() for t in case[:3])
    return (
        reference.hash_encode(x, table, case[3]),
        reference.hash_encode_gradients(grad.t(), x, None, case[3]),
        reference.hash_encode_gradients(grad.t(), x, table, case[3]),
    )


@pytest.mark.parametrize("name", SPECS)
def test_value_and_both_gradients_equal_the_oracle_in_float64(emulated: Any, schedule: Any, name: str) -> None:
    for n in COUNTS:
        case = draw(SPECS[name], n)
        for got, want in zip(run_all(emulated, case), oracle(case), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
def test_float32_agrees_with_the_float64_oracle_to_rounding(emulated: Any, schedule: Any, name: str) -> None:
    spec = SPECS[name]
    case = draw(spec, 700, torch.float32)
    got, want = run_all(emulated, case), oracle(case)
    # A position of size s carries an error of s * 2^-24, which the weights (and d/dx = s * difference) inherit.
    tolerance = spec.finest_resolution * 2.0**-22
    position = case[0].double()[:, None, :] * torch.tensor(spec.scales)[:, None] + 0.5  # (n, levels, 3)
    interior = ((position - position.round()).abs() > 1e-4).all(-1).all(-1)  # d/dx jumps at a cell face
    assert interior.double().mean() > 0.95
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=4 * tolerance)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=100 * tolerance)  # sums of up to n terms
    scale = spec.finest_resolution * spec.output_dim
    torch.testing.assert_close(
        got[2].double()[interior] / scale, want[2][interior] / scale, rtol=1e-4, atol=4 * tolerance
    )


@pytest.mark.parametrize("features", [1, 2, 4, 8])
def test_half_table_is_interpolated_in_float32(emulated: Any, schedule: Any, features: int) -> None:
    spec = HashGridSpec(4, features, 10, 4, 64)
    for n in (0, 1, 33, 300):
        x, table, _, _ = draw(spec, n, torch.float32)
        got = encode(emulated, x, table.half(), spec)
        torch.testing.assert_close(got, encode(emulated, x, table.half().float(), spec), rtol=0, atol=0)
        want = reference.hash_encode(x.double(), table.half().double(), spec)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=64 * 2.0**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["dense_small", "small_and_large", "collisions", "base_one"])
def test_points_outside_count_as_clamped_with_zero_gradient(
    emulated: Any, schedule: Any, name: str, dtype: torch.dtype
) -> None:
    spec = SPECS[name]
    x = torch.tensor(list(itertools.product(HOSTILE, repeat=3)), dtype=dtype)
    _, table, grad, _ = draw(spec, len(x), dtype)
    inside = torch.nan_to_num(x, nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1)
    out, grad_table, grad_x = run_all(emulated, (x, table, grad, spec))
    want, want_table, want_x = oracle((inside, table, grad, spec))
    # At 0.37 no position is near a cell face, where the derivative jumps.
    rtol, atol = (1e-4, 2e-2) if dtype == torch.float32 else (1e-10, 1e-10)
    kept = (x >= 0) & (x <= 1)
    torch.testing.assert_close(out.double(), want, rtol=rtol, atol=atol)
    torch.testing.assert_close(grad_table.double(), want_table, rtol=rtol, atol=atol)
    assert not bool(grad_x[~kept].any())
    torch.testing.assert_close(grad_x.double()[kept] / 64, want_x[kept] / 64, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", SPECS)
def test_no_points_give_empty_output_and_zero_table_gradient(emulated: Any, schedule: Any, name: str) -> None:
    out, grad_table, grad_x = run_all(emulated, draw(SPECS[name], 0))
    assert out.numel() == grad_x.numel() == 0 and not bool(grad_table.any())


@pytest.mark.parametrize("name", ["small_and_large", "collisions"])
def test_thousands_of_points_in_one_cell_and_several_blocks_add_up(emulated: Any, schedule: Any, name: str) -> None:
    """More points than one block of the shared-memory kernel takes (2048), most of them in the same rows."""
    x, table, grad, spec = draw(SPECS[name], 2100)
    x[100:2060] = x[0]
    want = oracle((x, table, grad, spec))[1]
    torch.testing.assert_close(table_gradient(emulated, x, grad, spec), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["small_and_large", "eight_features"])
def test_zero_and_nan_gradients(emulated: Any, schedule: Any, name: str) -> None:
    """Zeros are not added; a NaN reaches its eight rows and no other."""
    x, table, grad, spec = draw(SPECS[name], 60)
    grad[:, ::2] = 0
    want = oracle((x, table, grad, spec))[1]
    torch.testing.assert_close(table_gradient(emulated, x, grad, spec), want, rtol=1e-11, atol=1e-11)
    grad[0, 7] = torch.nan
    spoiled = oracle((x, table, grad, spec))[1]
    got = table_gradient(emulated, x, grad, spec)
    assert torch.equal(got.isnan(), spoiled.isnan()) and 1 <= int(got.isnan().sum()) <= 8
    torch.testing.assert_close(got, spoiled, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_sixty_four_levels_are_the_most(emulated: Any, schedule: Any) -> None:
    case = draw(HashGridSpec(64, 1, 6, 2, 40), 40)
    for got, want in zip(run_all(emulated, case), oracle(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_value_and_input_gradient_do_not_depend_on_the_order_of_threads(emulated: Any) -> None:
    x, table, grad, spec = draw(SPECS["small_and_large"], 300, torch.float32)
    runs = []
    for kind in (0, 1, 2):
        emulated.schedule(kind, 5)
        runs.append((encode(emulated, x, table, spec), input_gradient(emulated, x, table, grad, spec)))
    emulated.schedule(0)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_impossible_arguments_are_refused(emulated: Any) -> None:
    x, table, _, spec = draw(SPECS["one_level"], 3, torch.float32)
    scales, resolutions, offsets, _, _ = spec.native_arguments
    out = torch.zeros(2 * 3)
    function = "pmf_hash_encode_cuda_f32"
    assert emulated.status(function, x, 3, table, scales, resolutions, offsets, 1, 3, out) == 1
    assert emulated.status(function, x, 3, table, scales, resolutions, offsets, 65, 2, out) == 1
    shifted = torch.zeros(table.numel() + 1)[1:]  # rows of two floats are fetched as one word of 8 bytes
    assert emulated.status(function, x, 3, shifted, *spec.native_arguments, out) == 1
    assert not bool(out.any())
