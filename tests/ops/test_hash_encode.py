"""hash_encode against its float64 oracle, tiny-cuda-nn's conventions and hostile input."""

from __future__ import annotations

import ctypes
import importlib
import itertools

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops._library import native_available, use_backend
from posemap_fast.ops.hash_encode import HashGridSpec, hash_encode
from posemap_fast.ops.reference.hash_encode import corner_rows
from posemap_fast.ops.reference.hash_encode import hash_encode as reference
from posemap_fast.seeding import step_generator

SPECS = {
    "dense_only": HashGridSpec(3, 2, 19, 4, 20),
    "hashed_only": HashGridSpec(3, 2, 8, 16, 100),
    "both": HashGridSpec(6, 2, 10, 4, 64),
    "both_and_prefetched": HashGridSpec(3, 2, 18, 40, 200),  # levels larger than the second level cache
    "one_feature": HashGridSpec(4, 1, 10, 4, 64),
    "four_features": HashGridSpec(4, 4, 10, 4, 64),
    "eight_features": HashGridSpec(4, 8, 10, 4, 64),
    "one_level": HashGridSpec(1, 2, 10, 5, 5),
    "base_one": HashGridSpec(3, 2, 3, 1, 8),
}
BACKENDS = ["native", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "native" and not native_available():
        pytest.skip("no native library; run python -m posemap_fast.ops._build_cli")
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def generator(request):
    return step_generator(0, request.node.name)


def draw(spec, n, generator, dtype=torch.float64):
    x = torch.rand(n, 3, generator=generator, dtype=dtype)
    table = torch.randn(spec.n_entries, spec.n_features_per_level, generator=generator, dtype=dtype)
    cotangent = torch.randn(n, spec.output_dim, generator=generator, dtype=dtype)
    return x, table, cotangent


def gradients(function, x, table, spec, cotangent):
    x, table = x.clone().requires_grad_(), table.clone().requires_grad_()
    out = function(x, table, spec)
    return (out.detach(), *torch.autograd.grad(out, (x, table), cotangent))


@pytest.mark.parametrize("n", [1, 15, 16, 17, 3000])
@pytest.mark.parametrize("name", SPECS)
def test_value_and_both_gradients_equal_the_oracle_in_float64(backend, name, n, generator):
    spec = SPECS[name]
    x, table, cotangent = draw(spec, n, generator)
    got = gradients(hash_encode, x, table, spec, cotangent)
    want = gradients(reference, x, table, spec, cotangent)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
def test_float32_agrees_with_the_float64_oracle_to_rounding(backend, name, generator):
    spec = SPECS[name]
    x, table, cotangent = draw(spec, 4000, generator, torch.float32)
    got = gradients(hash_encode, x, table, spec, cotangent)
    want = gradients(reference, x.double(), table.double(), spec, cotangent.double())
    # A position of size s carries an error of s * 2^-24, which the weights (and d/dx = s * difference) inherit.
    tolerance = spec.finest_resolution * 2.0**-22
    position = x.double()[:, None, :] * torch.tensor(spec.scales)[:, None] + 0.5  # (n, levels, 3)
    interior = ((position - position.round()).abs() > 1e-4).all(-1).all(-1)  # d/dx jumps at a cell face
    assert interior.double().mean() > 0.95
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=4 * tolerance)
    torch.testing.assert_close(got[2].double(), want[2], rtol=1e-4, atol=100 * tolerance)  # sums of up to n terms
    scale = spec.finest_resolution * spec.output_dim
    torch.testing.assert_close(
        got[1].double()[interior] / scale, want[1][interior] / scale, rtol=1e-4, atol=4 * tolerance
    )


@pytest.mark.parametrize("name", ["both", "one_feature", "four_features", "dense_only"])
def test_gradcheck_in_table_and_position(backend, name, generator):
    spec = HashGridSpec(3, SPECS[name].n_features_per_level, 5 if name != "dense_only" else 12, 2, 6)
    x = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    for scale in spec.scales:  # away from cell faces, where the derivative jumps
        position = x * scale + 0.5
        x = torch.where((position - position.round()).abs() < 0.02, x + 0.03 / max(scale, 1.0), x).clamp(0.01, 0.99)
    table = torch.randn(spec.n_entries, spec.n_features_per_level, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, table: hash_encode(x, table, spec), (x.requires_grad_(), table.requires_grad_()), eps=1e-7, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_registration_passes_opcheck(backend, dtype, generator):
    spec = HashGridSpec(3, 2, 8, 4, 20)
    x, table, cotangent = draw(spec, 7, generator, dtype)
    numbers = (3, 2, 8, 4, 20)
    ops = torch.ops.posemap_fast
    torch.library.opcheck(ops.hash_encode.default, (x.requires_grad_(), table.requires_grad_(), *numbers))
    torch.library.opcheck(ops.hash_encode_backward_table.default, (cotangent, x.detach(), *numbers))
    torch.library.opcheck(ops.hash_encode_backward_x.default, (cotangent, x.detach(), table.detach(), *numbers))


def test_convention_of_level_sizes_is_tiny_cuda_nns():
    spec = HashGridSpec()
    # scale_0 = 16 - 1, ceil + 1 = 16 points; scale_15 = 2048 - 1; b = 128^(1/15)
    assert (spec.scales[0], spec.resolutions[0]) == (15.0, 16)
    assert (spec.scales[-1], spec.resolutions[-1]) == (2047.0, 2048)
    assert spec.resolutions[1] == 23  # 16 * 128^(1/15) - 1 = 21.11, ceil + 1
    assert spec.level_offsets[:3] == (0, 4096, 4096 + 12168)  # 16^3; 23^3 = 12167 rounded up to 8
    assert spec.level_offsets[-1] - spec.level_offsets[-2] == 1 << 19
    assert spec.output_dim == 32
    assert spec.n_entries == spec.level_offsets[-1]


def test_convention_of_rows_by_hand(backend):
    # Dense, resolution 5: row = 1 + 2*5 + 3*25 = 86. Hashed, 2^4 rows: 1 ^ 2*2654435761 ^ 3*805459861 mod 2^32:
    # 2*2654435761 mod 16 = 2, 3*805459861 mod 16 = 15, 1 ^ 2 ^ 15 = 12.
    corner = torch.tensor([[1, 2, 3]])
    assert corner_rows(corner, 5, 128).item() == 86
    assert corner_rows(corner, 5, 16).item() == 12
    for log2_size, row in ((7, 86), (4, 12)):
        spec = HashGridSpec(1, 2, log2_size, 5, 5)  # scale 4: x = (corner - 0.5) / 4 sits on the corner
        table = torch.zeros(spec.n_entries, 2, dtype=torch.float64)
        table[row] = torch.tensor([3.0, -4.0], dtype=torch.float64)
        x = torch.tensor([[0.125, 0.375, 0.625]], dtype=torch.float64)
        assert hash_encode(x, table, spec).tolist() == [[3.0, -4.0]]


def test_convention_far_corner_of_a_dense_level_wraps_to_the_next_row(backend):
    # x = 1: position 4.5, corners 4 and 5 by half; 5 lies outside and its index 5 is the row of (0, 1, 0).
    # y = z = 0: position 0.5, corners 0 and 1 by half. Only (5, 0, 0) has index 5: weight 1/8.
    spec = HashGridSpec(1, 1, 10, 5, 5)
    table = torch.zeros(spec.n_entries, 1, dtype=torch.float64)
    table[5] = 8.0
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    assert hash_encode(x, table, spec).item() == 1.0
    # x = y = z = 1: (5, 5, 5) has index 155 and 128 rows exist: 155 - 128 = 27, the row of (2, 0, 1).
    assert spec.n_entries == 128
    table = torch.zeros_like(table)
    table[27] = 8.0
    assert hash_encode(torch.ones(1, 3, dtype=torch.float64), table, spec).item() == 1.0


def test_encoding_is_linear_in_the_table(backend, generator):
    spec = SPECS["both"]
    x, first, _ = draw(spec, 50, generator)
    second = torch.randn(first.shape, generator=generator, dtype=torch.float64)
    whole = hash_encode(x, 2 * first - second, spec)
    torch.testing.assert_close(whole, 2 * hash_encode(x, first, spec) - hash_encode(x, second, spec))


def test_constant_table_gives_the_constant_and_no_position_gradient(backend, generator):
    spec = SPECS["both"]
    x, table, cotangent = draw(spec, 50, generator)
    out, grad_x, _ = gradients(hash_encode, x, torch.ones_like(table), spec, cotangent)
    torch.testing.assert_close(out, torch.ones_like(out))
    torch.testing.assert_close(grad_x, torch.zeros_like(grad_x), atol=1e-10, rtol=0)


HOSTILE = [0.0, 1.0, -0.0, -1e-9, 1 + 1e-9, -3.0, 7.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["dense_only", "both", "hashed_only"])
def test_points_outside_count_as_clamped_with_zero_gradient(backend, name, dtype, generator):
    spec = SPECS[name]
    x = torch.tensor(list(itertools.product(HOSTILE, repeat=3)), dtype=dtype)
    _, table, cotangent = draw(spec, len(x), generator, dtype)
    inside = torch.nan_to_num(x, nan=0.0, posinf=1.0, neginf=0.0).clamp(0, 1)
    out, grad_x, grad_table = gradients(hash_encode, x, table, spec, cotangent)
    want, want_x, want_table = gradients(reference, inside, table, spec, cotangent)
    kept = (x >= 0) & (x <= 1)
    tolerance = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    torch.testing.assert_close(out, want, **tolerance)
    torch.testing.assert_close(grad_x, torch.where(kept, want_x, 0.0), rtol=1e-4, atol=2e-2)
    torch.testing.assert_close(grad_table, want_table, **tolerance)


def test_gradient_reaches_points_exactly_on_the_border(backend, generator):
    spec = SPECS["dense_only"]
    x = torch.tensor([[0.0, 1.0, 0.5]], dtype=torch.float64)
    _, table, cotangent = draw(spec, 1, generator)
    assert (gradients(hash_encode, x, table, spec, cotangent)[1] != 0).all()


def test_no_points_give_empty_output_and_zero_table_gradient(backend):
    spec = SPECS["both"]
    x = torch.empty(0, 3, requires_grad=True)
    table = torch.randn(spec.n_entries, 2, requires_grad=True)
    out = hash_encode(x, table, spec)
    out.sum().backward()
    assert out.shape == (0, spec.output_dim)
    assert x.grad.shape == (0, 3)
    assert not table.grad.any()


def test_layouts_of_input_and_gradient_do_not_matter(backend, generator):
    spec = SPECS["both"]
    x, table, cotangent = draw(spec, 333, generator)
    want = gradients(hash_encode, x, table, spec, cotangent)
    strided_x = torch.stack([x, x], dim=1).flatten(1)[:, :3]
    strided_table = table.t().contiguous().t()
    soa = cotangent.t().contiguous().t()
    assert not strided_x.is_contiguous()
    for got in (
        gradients(hash_encode, strided_x, strided_table, spec, soa),
        gradients(hash_encode, x.t().contiguous().t(), table, spec, cotangent),
    ):
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)
    expanded = gradients(hash_encode, x, table, spec, torch.ones(1, 1, dtype=x.dtype).expand_as(cotangent))
    torch.testing.assert_close(expanded[2].sum(), torch.tensor(333.0 * spec.output_dim, dtype=x.dtype))


def test_output_is_a_view_of_level_major_storage(backend, generator):
    spec = SPECS["both"]
    x, table, _ = draw(spec, 20, generator)
    out = hash_encode(x, table, spec)
    assert out.t().is_contiguous()
    assert not out.requires_grad


@pytest.mark.parametrize(("need_x", "need_table"), [(True, False), (False, True)])
def test_only_the_needed_gradient_is_computed(need_x, need_table, generator, monkeypatch):
    module = importlib.import_module("posemap_fast.ops.hash_encode")  # the package re-exports a function of that name
    calls = []
    for name in ("_op_backward_x", "_op_backward_table"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, _n=name, _o=original: calls.append(_n) or _o(*a))
    spec = SPECS["both"]
    x, table, cotangent = draw(spec, 9, generator)
    hash_encode(x.requires_grad_(need_x), table.requires_grad_(need_table), spec).backward(cotangent)
    assert calls == (["_op_backward_x"] if need_x else ["_op_backward_table"])
    assert (x.grad is not None, table.grad is not None) == (need_x, need_table)


def test_second_derivative_is_refused(backend, generator):
    spec = SPECS["both"]
    x, table, _ = draw(spec, 4, generator)
    (grad_x,) = torch.autograd.grad(
        hash_encode(x.requires_grad_(), table.requires_grad_(), spec).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad_x.sum().backward()


@pytest.mark.skipif(not native_available(), reason="no native library")
@pytest.mark.parametrize("name", ["both", "both_and_prefetched", "eight_features"])
def test_results_are_bitwise_repeatable_for_any_number_of_threads(name, generator):
    spec = SPECS[name]
    x, table, cotangent = draw(spec, 40_000, generator, torch.float32)
    x[::2] = x[0]  # many points meet in one cell
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            runs.append(gradients(hash_encode, x, table, spec, cotangent))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.skipif(not native_available(), reason="no native library")
@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["both", "one_feature", "four_features"])
def test_kernels_write_their_output_and_nothing_around_it(name, dtype, n, generator):
    spec = SPECS[name]
    x, table, cotangent = draw(spec, n, generator, dtype)
    grad = cotangent.t().contiguous()
    margin, canary = 64, 12345.0
    sizes = {"": spec.output_dim * n, "_backward_table": table.numel(), "_backward_x": 3 * n}
    inputs = {"": (table,), "_backward_table": (grad,), "_backward_x": (grad, table)}
    for kernel, size in sizes.items():
        buffer = torch.full((size + 2 * margin,), canary, dtype=dtype)
        out = ctypes.c_void_p(buffer.data_ptr() + margin * buffer.element_size())
        cpu_face().call(f"hash_encode{kernel}", x, x, n, *inputs[kernel], *spec.native_arguments, out)
        assert (buffer[:margin] == canary).all()
        assert (buffer[-margin:] == canary).all()
        assert (buffer[margin:-margin] != canary).all()


def test_wrong_arguments_are_named():
    spec = HashGridSpec(3, 2, 8, 4, 20)
    x, table = torch.rand(4, 3), torch.rand(spec.n_entries, 2)
    cases = [
        ((torch.rand(4, 2), table), r"x must have shape \(n, 3\); got \(4, 2\)"),
        ((x, table[:-1]), r"table must have shape \(\d+, 2\)"),
        ((x.half(), table), "x must be torch.float32 or torch.float64; got torch.float16"),
        ((x, table.double()), "table must be torch.float32 or torch.float16; got torch.float64"),
        ((x, table.to("meta")), "all tensors must be on one device"),
    ]
    for arguments, message in cases:
        with pytest.raises(ShapeError, match=message):
            hash_encode(*arguments, spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_levels", 0),
        ("n_features_per_level", 3),
        ("log2_hashmap_size", 2),
        ("base_resolution", 0),
        ("finest_resolution", 8),
    ],
)
def test_impossible_specs_are_refused(field, value):
    with pytest.raises(ShapeError, match=field):
        HashGridSpec(**{field: value})
