"""The second part of fused_mlp's input: rows of their own, or features of rays, against the float64 oracle."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from posemap_fast.errors import BackendError, ShapeError
from posemap_fast.ops import _library
from posemap_fast.ops.fused_mlp import MLPSpec, fused_mlp
from posemap_fast.ops.reference.fused_mlp import fused_mlp as reference_mlp
from posemap_fast.seeding import step_generator

F64_TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}
DIMS = [(16 + 32, 64, 64, 3), (15 + 20, 32, 7), (1 + 1, 16, 1), (3 + 17, 5), (16 + 32, 16), (7 + 1, 24, 80, 40, 5)]
SPLIT = {48: 32, 35: 20, 2: 1, 20: 17, 8: 1}  # first width -> width of the second part


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    with _library.use_backend(request.param):
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return step_generator(0, request.node.nodeid)


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, MLPSpec]


def case(rng: torch.Generator, dims: tuple[int, ...], n: int, n_extra: int) -> Case:
    """x, params, extra, cotangent, spec in float64."""
    spec = MLPSpec(dims)
    width = SPLIT.get(dims[0], dims[0] // 2)
    weights = [torch.randn(o, i, generator=rng, dtype=torch.float64) * (2 / i) ** 0.5 for o, i in spec.layer_shapes]
    x = torch.randn(n, dims[0] - width, generator=rng, dtype=torch.float64)
    extra = torch.randn(n_extra, width, generator=rng, dtype=torch.float64)
    cotangent = torch.randn(n, dims[-1], generator=rng, dtype=torch.float64)
    return x, torch.cat([w.flatten() for w in weights]), extra, cotangent, spec


def results(inputs: Case, index: torch.Tensor | None, *, oracle: bool = False) -> tuple[torch.Tensor, ...]:
    """Output and the gradients of x, extra and params."""
    x, params, extra, cotangent, spec = inputs
    x, params, extra = (t.detach().requires_grad_() for t in (x, params, extra))
    y = reference_mlp(x, params, spec.dims, extra, index) if oracle else fused_mlp(x, params, spec, extra, index)
    return (y.detach(), *torch.autograd.grad(y, (x, extra, params), cotangent))


def sorted_index(rng: torch.Generator, n: int, n_extra: int) -> torch.Tensor:
    return torch.randint(n_extra, (n,), generator=rng).sort().values


@pytest.mark.parametrize("n", [0, 1, 47, 96, 97, 613, 5003])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_rows_of_their_own_equal_the_oracle(backend: str, rng: torch.Generator, dims: tuple[int, ...], n: int) -> None:
    inputs = case(rng, dims, n, n)
    for got, want in zip(results(inputs, None), results(inputs, None, oracle=True), strict=True):
        torch.testing.assert_close(got, want, **F64_TOLERANCE)


# 1 ray: it goes on through all chunks of rows. 7: most chunks hold part of one ray. 9000: most rays have no row.
@pytest.mark.parametrize("n_rays", [1, 7, 90, 9000])
@pytest.mark.parametrize("n", [1, 97, 480, 481, 5003])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_features_of_rays_equal_the_oracle(
    backend: str, rng: torch.Generator, dims: tuple[int, ...], n: int, n_rays: int
) -> None:
    inputs, index = case(rng, dims, n, n_rays), sorted_index(rng, n, n_rays)
    for got, want in zip(results(inputs, index), results(inputs, index, oracle=True), strict=True):
        torch.testing.assert_close(got, want, **F64_TOLERANCE)


@pytest.mark.parametrize("ends", ["on", "before", "after"])
def test_rays_that_end_at_or_beside_the_end_of_a_chunk(backend: str, rng: torch.Generator, ends: str) -> None:
    """480 rows make a chunk at this size: a ray must not be counted twice or lost at its border."""
    shift = {"on": 0, "before": -1, "after": 1}[ends]
    counts = torch.tensor([480 + shift, 480, 0, 960, 1, 479])
    index = torch.repeat_interleave(torch.arange(6), counts)
    inputs = case(rng, DIMS[0], len(index), 6)
    for got, want in zip(results(inputs, index), results(inputs, index, oracle=True), strict=True):
        torch.testing.assert_close(got, want, **F64_TOLERANCE)


def test_column_major_x_beside_a_second_part(backend: str, rng: torch.Generator) -> None:
    """What the pose branch passes: the hash encoding as it is stored, and the density network's output."""
    x, params, extra, cotangent, spec = case(rng, (35, 32, 7), 131, 131)
    by_column = (x.t().contiguous().t(), params, extra, cotangent, spec)
    got, want = results(by_column, None), results((x, params, extra, cotangent, spec), None, oracle=True)
    assert got[1].stride() == (1, 131)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, **F64_TOLERANCE)


@pytest.mark.parametrize("per_ray", [False, True])
def test_gradcheck(backend: str, rng: torch.Generator, per_ray: bool) -> None:
    x, params, extra, _, spec = case(rng, (6, 4, 4, 2), 5, 3 if per_ray else 5)
    index = torch.tensor([0, 0, 2, 2, 2]) if per_ray else None
    leaves = tuple(t.requires_grad_() for t in (x, params, extra))
    assert torch.autograd.gradcheck(lambda a, p, e: fused_mlp(a, p, spec, e, index), leaves)


@pytest.mark.parametrize("per_ray", [False, True])
def test_each_gradient_alone_equals_that_of_all(backend: str, rng: torch.Generator, per_ray: bool) -> None:
    x, params, extra, cotangent, spec = case(rng, (35, 32, 7), 700, 20 if per_ray else 700)
    index = sorted_index(rng, 700, 20) if per_ray else None
    wanted = results((x, params, extra, cotangent, spec), index)[1:]
    for k, leaf in enumerate((x, extra, params)):
        leaf = leaf.clone().requires_grad_()
        parts = [x, extra, params]
        parts[k] = leaf
        y = fused_mlp(parts[0], parts[2], spec, parts[1], index)
        torch.testing.assert_close(torch.autograd.grad(y, leaf, cotangent)[0], wanted[k], **F64_TOLERANCE)


def test_bitwise_the_same_for_any_number_of_threads(rng: torch.Generator) -> None:
    if _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    inputs, index = case(rng, DIMS[0], 9001, 300), sorted_index(rng, 9001, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = results(inputs, index)
        for n_threads in (1, 3, 2):
            torch.set_num_threads(n_threads)
            assert all(torch.equal(a, b) for a, b in zip(results(inputs, index), first, strict=True)), n_threads
    finally:
        torch.set_num_threads(before)


def test_nan_of_a_ray_stays_in_its_rows(backend: str, rng: torch.Generator) -> None:
    inputs, index = case(rng, DIMS[0], 600, 30), sorted_index(rng, 600, 30)
    clean = results(inputs, index)
    inputs[2][11] = float("nan")
    got = results(inputs, index)
    others = index != 11
    assert torch.equal(got[0][others], clean[0][others]) and bool(got[0][~others].isnan().all())
    assert torch.equal(got[1][others], clean[1][others])
    rays = torch.arange(30) != 11
    assert torch.equal(got[2][rays], clean[2][rays])


@pytest.mark.parametrize("index", [[1, 0, 2], [0, 1, 3], [-1, 0, 1]])
def test_unsorted_or_foreign_index_is_refused_by_the_kernel(index: list[int]) -> None:
    if _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    with _library.use_backend("native"), pytest.raises(BackendError, match="an index must be sorted"):
        fused_mlp(torch.zeros(3, 1), torch.zeros(2), MLPSpec((2, 1)), torch.zeros(3, 1), torch.tensor(index))


@pytest.mark.parametrize(
    ("extra", "index", "message"),
    [
        (torch.zeros(4, 1), None, r"extra must have shape \(3, 1\)"),
        (torch.zeros(3, 2), None, r"x must have shape \(n, 0\)"),
        (torch.zeros(3, 1).double(), None, "extra must be torch.float32"),
        (torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64), r"extra_index must have shape \(3\)"),
        (torch.zeros(2, 1), torch.zeros(3, dtype=torch.int32), "extra_index must be torch.int64"),
        (None, torch.zeros(3, dtype=torch.int64), "extra_index needs extra"),
    ],
)
def test_unfit_second_parts_are_refused_by_name(
    extra: torch.Tensor | None, index: torch.Tensor | None, message: str
) -> None:
    spec = MLPSpec((1 if extra is None else 2, 1))
    with pytest.raises(ShapeError, match=f"fused_mlp: .*{message}"):
        fused_mlp(torch.zeros(3, 1), torch.zeros(spec.n_params), spec, extra, index)
