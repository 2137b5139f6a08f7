"""fused_mlp against its float64 oracle: values, gradients, memory layouts, edges, repeatability."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from posemap_fast.errors import BackendError, ConfigError, ShapeError
from posemap_fast.ops import _library
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops.fused_mlp import MLPSpec, fused_mlp
from posemap_fast.ops.reference.fused_mlp import fused_mlp as reference_mlp
from posemap_fast.seeding import step_generator

DIMS = [
    (32, 64, 64, 16),  # density network
    (32, 64, 16),
    (48, 64, 64),
    (48, 64, 64, 3),  # colour network
    (35, 32, 7),  # no width is a whole number of vectors
    (1, 16, 1),
    (256, 128, 12),
    (20, 3),  # one matrix
    (32, 16),  # the same, of whole vectors
    (8, 24, 80, 40, 5),  # four matrices
]
# Around the block of 96 rows and the register tiles of 8, 6, 4, 2 and 1; 5003 rows run on several threads.
ROWS = [1, 2, 7, 48, 95, 96, 97, 613, 5003]
LAYOUTS = ["row_major", "unaligned", "column_major", "strided"]
F64_TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}  # sums of at most 5003 terms of order 1: 1e-16 * 5003, and some room


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    with _library.use_backend(request.param):
        yield request.param


@pytest.fixture
def native() -> Iterator[None]:
    if _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    with _library.use_backend("native"):
        yield


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return step_generator(0, request.node.nodeid)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def in_layout(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same (n, d) values stored row-major, on a vector boundary or beside one, column-major, or `strided`.

    Those are every second row and column of a larger matrix.
    """
    n, width = values.shape
    if layout == "row_major":
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "unaligned":
        return torch.cat([values.new_zeros(1), values.flatten()])[1:].view(n, width)
    if layout == "column_major":
        return values.t().contiguous().t()
    storage = values.new_full((2 * n, 2 * width), float("nan"))
    storage[::2, ::2] = values
    return storage[::2, ::2]


def case(
    rng: torch.Generator, dims: tuple[int, ...], n: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, MLPSpec]:
    """Inputs, weights that keep the activations of order 1, and a cotangent."""
    spec = MLPSpec(dims)
    weights = [torch.randn(o, i, generator=rng, dtype=dtype) * (2 / i) ** 0.5 for o, i in spec.layer_shapes]
    x = torch.randn(n, dims[0], generator=rng, dtype=dtype)
    cotangent = torch.randn(n, dims[-1], generator=rng, dtype=dtype)
    return x, torch.cat([w.flatten() for w in weights]), cotangent, spec


def run(
    x: torch.Tensor, params: torch.Tensor, cotangent: torch.Tensor, spec: MLPSpec, *, oracle: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and both gradients of the op, or of the oracle."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    y = reference_mlp(x, params, spec.dims) if oracle else fused_mlp(x, params, spec)
    grad_x, grad_params = torch.autograd.grad(y, (x, params), cotangent)
    return y.detach(), grad_x, grad_params


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_values_and_gradients_equal_the_oracle(
    native: None, rng: torch.Generator, dims: tuple[int, ...], n: int
) -> None:
    inputs = case(rng, dims, n)
    for got, want in zip(run(*inputs), run(*inputs, oracle=True), strict=True):
        torch.testing.assert_close(got, want, **F64_TOLERANCE)


@pytest.mark.parametrize("cotangent_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(32, 64, 64, 16), (35, 32, 7), (1, 16, 1), (32, 16)], ids=str)
def test_memory_layout_does_not_change_any_result(
    backend: str, rng: torch.Generator, dims: tuple[int, ...], x_layout: str, cotangent_layout: str
) -> None:
    for n in (1, 50, 171):
        x, params, cotangent, spec = case(rng, dims, n)
        got = run(in_layout(x, x_layout), params, in_layout(cotangent, cotangent_layout), spec)
        for value, want in zip(got, run(x, params, cotangent, spec, oracle=True), strict=True):
            torch.testing.assert_close(value, want, **F64_TOLERANCE)


@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_gradient_of_x_has_the_layout_of_x_and_the_output_is_row_major(
    backend: str, rng: torch.Generator, layout: str
) -> None:
    x, params, cotangent, spec = case(rng, (32, 64, 16), 100)
    y, grad_x, _ = run(in_layout(x, layout), params, cotangent, spec)
    assert y.is_contiguous()
    assert grad_x.stride() == ((1, 100) if layout == "column_major" else (32, 1))


@pytest.mark.parametrize("n_out", [3, 16])
def test_expanded_cotangent_of_a_sum_is_accepted(backend: str, rng: torch.Generator, n_out: int) -> None:
    x, params, _, spec = case(rng, (20, 32, n_out), 130)
    ones = torch.ones((), dtype=x.dtype).expand(130, n_out)  # strides (0, 0), as sum().backward() makes
    for got, want in zip(run(x, params, ones, spec), run(x, params, ones.clone(), spec, oracle=True), strict=True):
        torch.testing.assert_close(got, want, **F64_TOLERANCE)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_float32_error_is_at_most_twice_that_of_torch(
    native: None, rng: torch.Generator, dims: tuple[int, ...], layout: str
) -> None:
    x, params, cotangent, spec = case(rng, dims, 4999, torch.float32)
    exact = run(x.double(), params.double(), cotangent.double(), spec, oracle=True)
    ours = run(in_layout(x, layout), params, cotangent, spec)
    torchs = run(x, params, cotangent, spec, oracle=True)
    for name, got, peer, want in zip(("y", "grad_x", "grad_params"), ours, torchs, exact, strict=True):
        # A sum of n float32 terms may be rounded anywhere: compare root mean squares, which do not hang on one element.
        error, peer_error = ((value.double() - want).square().mean().sqrt() for value in (got, peer))
        tiny = 1e-7 * want.square().mean().sqrt()
        assert error <= 2 * peer_error + tiny, f"{name}: {error:.2e} against torch's {peer_error:.2e}"


@pytest.mark.parametrize("dims", [(3, 4, 4, 2), (5, 7, 3, 2, 2), (4, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(backend: str, rng: torch.Generator, dims: tuple[int, ...], layout: str) -> None:
    x, params, _, spec = case(rng, dims, 5)
    inputs = (in_layout(x, layout).requires_grad_(), params.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: fused_mlp(a, b, spec), inputs)


@pytest.mark.parametrize("layout", ["row_major", "column_major"])
def test_opcheck_of_forward_and_backward(backend: str, rng: torch.Generator, layout: str) -> None:
    x, params, cotangent, spec = case(rng, (6, 9, 4), 11, torch.float32)
    x, dims = in_layout(x, layout), list(spec.dims)
    ops = torch.ops.posemap_fast
    leaf = x.clone().requires_grad_()
    assert leaf.stride() == x.stride()
    torch.library.opcheck(ops.fused_mlp.default, (leaf, params.clone().requires_grad_(), dims, None, None))
    for needs in [[True, False, True], [True, False, False], [False, False, True]]:
        torch.library.opcheck(ops.fused_mlp_backward.default, (cotangent, x, params, dims, needs, None, None))
    rays, index = x[:3, 4:].contiguous(), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    for second, rows in ((x[:, 4:].contiguous(), None), (rays, index)):
        inputs = (leaf[:, :4].detach().requires_grad_(), params.clone().requires_grad_(), dims, second, rows)
        torch.library.opcheck(ops.fused_mlp.default, inputs)
        needs = [True, True, True]
        torch.library.opcheck(ops.fused_mlp_backward.default, (cotangent, x[:, :4], params, dims, needs, second, rows))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_needed_gradient_is_computed_and_it_equals_that_of_both(
    backend: str, rng: torch.Generator, layout: str
) -> None:
    x, params, cotangent, spec = case(rng, (35, 32, 7), 131)
    x, dims = in_layout(x, layout), list(spec.dims)
    backward = torch.ops.posemap_fast.fused_mlp_backward
    both = backward(cotangent, x, params, dims, [True, False, True], None, None)
    only_x = backward(cotangent, x, params, dims, [True, False, False], None, None)
    only_params = backward(cotangent, x, params, dims, [False, False, True], None, None)
    assert torch.equal(only_x[0], both[0]) and only_x[2].numel() == 0
    assert torch.equal(only_params[2], both[2]) and only_params[0].numel() == 0
    params_leaf = params.clone().requires_grad_()
    fused_mlp(x, params_leaf, spec).backward(cotangent)
    assert torch.equal(params_leaf.grad, both[2])
    x_leaf = x.clone().requires_grad_()
    fused_mlp(x_leaf, params, spec).backward(cotangent)
    torch.testing.assert_close(x_leaf.grad, both[0])


def test_no_rows_give_no_output_and_a_zero_gradient(backend: str, rng: torch.Generator) -> None:
    x, params, cotangent, spec = case(rng, (8, 16, 3), 0)
    y, grad_x, grad_params = run(x, params, cotangent, spec)
    assert y.shape == (0, 3) and grad_x.shape == (0, 8)
    assert torch.equal(grad_params, torch.zeros_like(params))


def test_relu_passes_no_gradient_at_exactly_zero(backend: str, rng: torch.Generator) -> None:
    _, params, cotangent, spec = case(rng, (8, 16, 16, 3), 60)
    x = torch.zeros(60, 8, dtype=torch.float64)  # every hidden value is exactly 0
    _, grad_x, grad_params = run(x, params, cotangent, spec)
    assert torch.count_nonzero(grad_x) == 0 and torch.count_nonzero(grad_params) == 0


def test_absolute_value_from_two_hidden_units(backend: str) -> None:
    x = torch.tensor([[-3.0], [0.0], [2.5]], requires_grad=True)
    y = fused_mlp(x, torch.tensor([1.0, -1.0, 1.0, 1.0]), MLPSpec((1, 2, 1)))
    y.sum().backward()
    assert y.flatten().tolist() == [3.0, 0.0, 2.5]
    assert x.grad is not None and x.grad.flatten().tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["row_major", "column_major"])
@pytest.mark.parametrize("dims", [(32, 64, 64, 16), (35, 32, 7)], ids=str)
def test_a_bad_input_stays_in_its_row_and_equals_torch_there(
    native: None, rng: torch.Generator, dims: tuple[int, ...], layout: str, bad: float
) -> None:
    x, params, cotangent, spec = case(rng, dims, 101)
    clean_y, clean_grad, _ = run(x, params, cotangent, spec)
    others = torch.arange(101) != 50
    x[50, 3] = bad
    y, grad_x, _ = run(in_layout(x, layout), params, cotangent, spec)
    assert torch.equal(y[others], clean_y[others]) and torch.equal(grad_x[others], clean_grad[others])
    want_y, want_grad, _ = run(x, params, cotangent, spec, oracle=True)
    torch.testing.assert_close(y[50], want_y[50], equal_nan=True, **F64_TOLERANCE)
    torch.testing.assert_close(grad_x[50], want_grad[50], equal_nan=True, **F64_TOLERANCE)


def test_nan_cotangent_stays_in_its_row_of_the_gradient_of_x(native: None, rng: torch.Generator) -> None:
    x, params, cotangent, spec = case(rng, (35, 32, 7), 101)
    clean = run(x, params, cotangent, spec)[1]
    cotangent[100, 2] = float("nan")
    got = run(x, params, cotangent, spec)[1]
    assert torch.equal(got[:100], clean[:100]) and bool(got[100].isnan().any())


def test_huge_and_tiny_values_scale_through(backend: str, rng: torch.Generator) -> None:
    x, params, _, spec = case(rng, (35, 32, 7), 77, torch.float32)
    y = fused_mlp(x, params, spec)
    for power in (2.0**100, 2.0**-60):  # the network is positively homogeneous, and a power of two is exact
        assert torch.equal(fused_mlp(x * power, params, spec), y * power)


def test_a_row_does_not_depend_on_its_place_or_neighbours(native: None, rng: torch.Generator) -> None:
    x, params, _, spec = case(rng, (32, 64, 64, 16), 5003, torch.float32)
    order = torch.randperm(5003, generator=rng)
    y = fused_mlp(x, params, spec)
    assert torch.equal(fused_mlp(x[order], params, spec), y[order])
    assert torch.equal(fused_mlp(x[17:18], params, spec), y[17:18])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bitwise_the_same_when_repeated_and_for_any_number_of_threads(
    native: None, rng: torch.Generator, threads: None, dtype: torch.dtype
) -> None:
    inputs = case(rng, (32, 64, 64, 16), 9001, dtype)
    torch.set_num_threads(2)
    first = run(*inputs)
    for n_threads in (2, 2, 1, 3):
        torch.set_num_threads(n_threads)
        for got, want in zip(run(*inputs), first, strict=True):
            assert torch.equal(got, want), f"{n_threads} threads"


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("dims", [(32, 64, 64, 16), (35, 32, 7), (1, 16, 1)], ids=str)
def test_kernel_stays_inside_its_buffers(
    native: None, rng: torch.Generator, dims: tuple[int, ...], column_major: bool
) -> None:
    """Canaries around every output keep their value; NaN around every input does not leak in."""
    guard, canary, n = 64, 12345.0, 50
    x, params, cotangent, spec = case(rng, dims, n, torch.float32)

    def guarded(values: torch.Tensor | None, count: int) -> torch.Tensor:
        storage = torch.full((count + 2 * guard,), canary if values is None else float("nan"))
        if values is not None:
            storage[guard:-guard] = values.flatten()
        return storage

    def strides(width: int) -> tuple[int, int]:
        return (1, n) if column_major else (width, 1)

    def stored(values: torch.Tensor) -> torch.Tensor:
        return guarded(values.t() if column_major else values, values.numel())[guard:]

    x_in, p_in, g_in = stored(x), guarded(params, spec.n_params)[guard:], stored(cotangent)
    outputs = [guarded(None, count) for count in (n * dims[-1], n * dims[0], spec.n_params)]
    y_out, gx_out, gp_out = (storage[guard:] for storage in outputs)
    c_dims = (ctypes.c_int64 * len(dims))(*dims)
    shape = (c_dims, len(dims) - 1, n)
    inner, outer = strides(dims[0]), strides(dims[-1])
    whole_x = (x_in, *inner, None, 0, None, n)
    cpu_face().run("pmf_fused_mlp_cpu_f32", torch.empty(0), *whole_x, p_in, *shape, y_out)
    cpu_face().run(
        "pmf_fused_mlp_backward_cpu_f32",
        torch.empty(0),
        g_in,
        *outer,
        *whole_x,
        p_in,
        *shape,
        gx_out,
        *inner,
        None,
        gp_out,
    )
    for storage in outputs:
        assert bool((storage[:guard] == canary).all()) and bool((storage[-guard:] == canary).all())
        assert bool(storage[guard:-guard].isfinite().all())


def test_kernel_refuses_impossible_sizes(native: None) -> None:
    x = torch.zeros(4, 1)
    with pytest.raises(BackendError, match="pmf_fused_mlp_cpu_f32 failed with status 1"):
        cpu_face().run(
            "pmf_fused_mlp_cpu_f32", torch.empty(0), x, 1, 1, None, 0, None, 4, x, (ctypes.c_int64 * 2)(1, 0), 1, 4, x
        )


@pytest.mark.parametrize(
    ("x", "params", "message"),
    [
        (torch.zeros(4, 3), torch.zeros(14), r"x must have shape \(n, 2\); got \(4, 3\)"),
        (torch.zeros(2), torch.zeros(14), r"x must have shape \(n, 2\); got \(2,\)"),
        (torch.zeros(4, 2), torch.zeros(13), r"params must have shape \(14\); got \(13,\)"),
        (torch.zeros(4, 2), torch.zeros(2, 7), r"params must have shape \(14\); got \(2, 7\)"),
        (torch.zeros(4, 2).half(), torch.zeros(14).half(), "x must be torch.float32 or torch.float64"),
        (torch.zeros(4, 2), torch.zeros(14).double(), "params must be torch.float32; got torch.float64"),
        (torch.zeros(4, 2), torch.zeros(14, device="meta"), "must be on one device; got x on cpu, params on meta"),
    ],
)
def test_unfit_tensors_are_refused_by_name(x: torch.Tensor, params: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=f"fused_mlp: .*{message}"):
        fused_mlp(x, params, MLPSpec((2, 4, 1, 2)))


@pytest.mark.parametrize("dims", [(), (3,), (3, 0, 2), (3, -1), (3, 2.5)], ids=str)
def test_impossible_widths_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="dims must be two or more positive integers"):
        MLPSpec(dims)


def test_spec_describes_the_parameters(rng: torch.Generator) -> None:
    spec = MLPSpec((2, 4, 3))
    assert spec.layer_shapes == ((4, 2), (3, 4)) and spec.n_params == 20
    first, second = spec.split(torch.arange(20.0))
    assert first[0].tolist() == [0.0, 1.0] and second[2].tolist() == [16.0, 17.0, 18.0, 19.0]


def test_second_derivative_is_an_error_not_a_zero(backend: str, rng: torch.Generator) -> None:
    x, params, _, spec = case(rng, (3, 4, 2), 5)
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(fused_mlp(x, params, spec).square().sum(), x, create_graph=True)
    with pytest.raises(BackendError, match="differentiable once"):
        grad_x.sum().backward()
