"""fused_radiance against its float64 oracle: values, every gradient, activation, edges, repeatability."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from posemap_fast.errors import BackendError, ConfigError, ShapeError
from posemap_fast.ops import MLPSpec, RadianceSpec, _library, fused_radiance
from posemap_fast.ops.reference.fused_radiance import fused_radiance as reference_radiance
from posemap_fast.seeding import step_generator

F64_TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}
SPECS = {
    "field": RadianceSpec(MLPSpec((32, 64, 16)), MLPSpec((48, 64, 64, 3)), bias=0.7, max_log_density=1.5),
    "odd": RadianceSpec(MLPSpec((7, 20, 24, 5)), MLPSpec((5 + 3, 19, 3)), bias=-0.3, max_log_density=0.1),
    "wide": RadianceSpec(MLPSpec((20, 33)), MLPSpec((33 + 1, 80, 40, 3)), max_log_density=12.0),
    "one": RadianceSpec(MLPSpec((1, 1)), MLPSpec((1 + 1, 3)), bias=0.1, max_log_density=0.2),
}


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    with _library.use_backend(request.param):
        yield request.param


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> torch.Generator:
    return step_generator(0, request.node.nodeid)


@dataclass
class Case:
    """Inputs (x, density_params, colour_params, view), the rays of the samples and a cotangent per output."""

    spec: RadianceSpec
    leaves: list[torch.Tensor]
    rays: torch.Tensor
    cotangents: list[torch.Tensor]

    def outputs(self, *, oracle: bool = False) -> tuple[torch.Tensor, ...]:
        x, density, colour, view = self.leaves
        if not oracle:
            return fused_radiance(x, density, colour, view, self.rays, self.spec)
        dims = self.spec.density.dims, self.spec.colour.dims
        activation = self.spec.bias, self.spec.max_log_density
        return reference_radiance(x, density, dims[0], view, self.rays, colour, dims[1], *activation)

    def results(self, *, oracle: bool = False, used: tuple[int, ...] = (0, 1, 2)) -> list[torch.Tensor]:
        """Outputs, and the gradients of all leaves through the outputs `used`."""
        self.leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        outputs = self.outputs(oracle=oracle)
        given = [outputs[i] for i in used], self.leaves, [self.cotangents[i] for i in used]
        grads = torch.autograd.grad(*given, allow_unused=True)
        filled = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, self.leaves, strict=True)]
        return [*(value.detach() for value in outputs), *filled]


def make(rng: torch.Generator, name: str, n: int, n_rays: int, dtype: torch.dtype = torch.float64) -> Case:
    spec = SPECS[name]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=dtype)

    density, colour = (
        torch.cat([(normal(o, i) * (2 / i) ** 0.5).flatten() for o, i in mlp.layer_shapes])
        for mlp in (spec.density, spec.colour)
    )
    leaves = [normal(n, spec.density.dims[0]), density, colour, normal(n_rays, spec.n_view)]
    rays = torch.randint(n_rays, (n,), generator=rng).sort().values
    return Case(spec, leaves, rays, [normal(n), normal(n, 3), normal(n, spec.density.dims[-1])])


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, **F64_TOLERANCE)


# 1 ray goes on through all chunks of rows; of 9000 rays most have no row. 5003 samples run on several threads.
@pytest.mark.parametrize("n_rays", [1, 7, 9000])
@pytest.mark.parametrize("n", [0, 1, 95, 96, 97, 480, 481, 5003])
@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_equal_the_oracle(
    backend: str, rng: torch.Generator, name: str, n: int, n_rays: int
) -> None:
    case = make(rng, name, n, n_rays)
    assert_equal(case.results(), case.results(oracle=True))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_an_output_that_no_loss_reads_changes_nothing(
    backend: str, rng: torch.Generator, used: tuple[int, ...]
) -> None:
    case = make(rng, "field", 700, 20)
    assert_equal(case.results(used=used), case.results(oracle=True, used=used))


@pytest.mark.parametrize("leaf", range(4), ids=["x", "density_params", "colour_params", "view"])
def test_each_gradient_alone_equals_that_of_all(backend: str, rng: torch.Generator, leaf: int) -> None:
    case = make(rng, "odd", 700, 20)
    want = case.results()[3 + leaf]
    case.leaves = [value.detach().requires_grad_(k == leaf) for k, value in enumerate(case.leaves)]
    (got,) = torch.autograd.grad(case.outputs(), case.leaves[leaf], case.cotangents)
    torch.testing.assert_close(got, want, **F64_TOLERANCE)


def test_column_major_encoding_is_read_in_place_and_its_gradient_is_column_major(
    backend: str, rng: torch.Generator
) -> None:
    case = make(rng, "field", 613, 9)
    want = case.results()
    case.leaves[0] = case.leaves[0].detach().t().contiguous().t()
    got = case.results()
    assert got[3].stride() == (1, 613)
    assert_equal(got, want)


def test_gradcheck(backend: str, rng: torch.Generator) -> None:
    spec = RadianceSpec(MLPSpec((3, 4, 3)), MLPSpec((3 + 2, 4, 3)), bias=0.2, max_log_density=5.0)
    sizes = [(5, 3), (spec.density.n_params,), (spec.colour.n_params,), (2, 2)]
    leaves = [torch.randn(*size, generator=rng, dtype=torch.float64).requires_grad_() for size in sizes]
    rays = torch.tensor([0, 0, 0, 1, 1])
    assert torch.autograd.gradcheck(lambda x, d, c, v: fused_radiance(x, d, c, v, rays, spec), leaves)


def test_registration_passes_opcheck(backend: str, rng: torch.Generator) -> None:
    case = make(rng, "odd", 6, 3)
    case.leaves = [leaf.requires_grad_() for leaf in case.leaves]
    x, density, colour, view = case.leaves
    dims = list(case.spec.density.dims), list(case.spec.colour.dims)
    inputs = (x, density, dims[0], view, case.rays, colour, dims[1], 0.1, 1.0)
    ops = torch.ops.posemap_fast
    torch.library.opcheck(ops.fused_radiance.default, inputs)
    plain = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in inputs)
    saved = ops.fused_radiance.default(*plain)
    for grad_geo in (None, case.cotangents[2]):
        given = (*case.cotangents[:2], grad_geo, *saved, *plain)
        for needs in ([True] * 4, [False, True, False, True], [True, False, False, False]):
            torch.library.opcheck(ops.fused_radiance_backward.default, (*given, needs))


def test_a_second_derivative_is_refused(backend: str, rng: torch.Generator) -> None:
    case = make(rng, "odd", 4, 2)
    case.leaves = [leaf.requires_grad_() for leaf in case.leaves]
    (grad,) = torch.autograd.grad(case.outputs()[1].sum(), case.leaves[0], create_graph=True)
    with pytest.raises(BackendError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("name", SPECS)
def test_float32_error_is_at_most_twice_that_of_torch(rng: torch.Generator, name: str) -> None:
    case = make(rng, name, 4999, 60, torch.float32)
    ours, torchs = case.results(), case.results(oracle=True)
    case.leaves = [leaf.detach().double() for leaf in case.leaves]
    case.cotangents = [c.double() for c in case.cotangents]
    for got, peer, want in zip(ours, torchs, case.results(oracle=True), strict=True):
        error, peer_error = ((value.double() - want).square().mean().sqrt() for value in (got, peer))
        assert error <= 2 * peer_error + 1e-7 * want.square().mean().sqrt()


def logits(values: list[float], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """sigma and rgb of networks that pass their input through: both activations at `values`."""
    spec = RadianceSpec(MLPSpec((1, 1)), MLPSpec((2, 3)), max_log_density=200.0)
    x = torch.tensor(values, dtype=dtype)[:, None]
    one, colour = torch.ones(1, dtype=dtype), torch.tensor([1.0, 0.0] * 3, dtype=dtype)
    rays = torch.zeros(len(values), dtype=torch.int64)
    sigmas, rgb, _ = fused_radiance(x, one, colour, torch.zeros(1, 1, dtype=dtype), rays, spec)
    return sigmas, rgb


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_are_those_of_torch_over_the_whole_range(backend: str, dtype: torch.dtype) -> None:
    values = [*torch.linspace(-110, 100, 4001).tolist(), 0.0, -0.0, 1e-30, 88.7, -87.4, -103.0, 1e30, -1e30]
    sigmas, rgb = logits(values, dtype)
    x = torch.tensor(values, dtype=dtype).clamp(max=200.0)
    bound = 3e-7 if dtype == torch.float32 else 1e-15  # two units in the last place of a float
    torch.testing.assert_close(sigmas, torch.exp(x), rtol=bound, atol=2e-45)
    torch.testing.assert_close(rgb[:, 0], torch.sigmoid(x), rtol=bound, atol=2e-45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_in_its_sample(backend: str, rng: torch.Generator, dtype: torch.dtype) -> None:
    case = make(rng, "field", 300, 10, dtype)
    want = case.results()
    case.leaves[0] = case.leaves[0].detach().clone()
    case.leaves[0][150, 3] = float("nan")
    got = case.results()
    others = torch.arange(300) != 150
    for k in range(4):  # sigma, rgb, geo, gradient of x
        assert bool(got[k][150].isnan().all())
        torch.testing.assert_close(got[k][others], want[k][others])


def test_beyond_the_largest_log_density_the_density_has_no_gradient(backend: str) -> None:
    spec = RadianceSpec(MLPSpec((1, 1)), MLPSpec((2, 3)), bias=1.0, max_log_density=2.0)
    x = torch.tensor([[0.5], [1.0], [1.5]], dtype=torch.float64).requires_grad_()
    ones = (
        torch.ones(1, dtype=torch.float64),
        torch.ones(6, dtype=torch.float64),
        torch.zeros(1, 1, dtype=torch.float64),
    )
    sigmas = fused_radiance(x, *ones, torch.zeros(3, dtype=torch.int64), spec)[0]
    sigmas.sum().backward()
    e = torch.tensor([1.5, 2.0, 2.0], dtype=torch.float64).exp()
    torch.testing.assert_close(sigmas, e)
    torch.testing.assert_close(x.grad[:, 0], e * torch.tensor([1.0, 1.0, 0.0]))


def test_result_does_not_depend_on_the_number_of_threads(rng: torch.Generator) -> None:
    case, before = make(rng, "field", 20_000, 300, torch.float32), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(case.results())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bad_input_is_refused(rng: torch.Generator) -> None:
    case = make(rng, "odd", 8, 3)
    x, density, colour, view = case.leaves
    with pytest.raises(ShapeError, match="view"):
        fused_radiance(x, density, colour, view[:, :2], case.rays, case.spec)
    with pytest.raises(ShapeError, match="colour_params"):
        fused_radiance(x, density, colour[:-1], view, case.rays, case.spec)
    with pytest.raises(ShapeError, match="ray_indices"):
        fused_radiance(x, density, colour, view, case.rays[:-1], case.spec)
    with pytest.raises(ShapeError, match="density_params"):
        fused_radiance(x, density.float(), colour, view, case.rays, case.spec)
    with pytest.raises(ConfigError, match="3 values"):
        RadianceSpec(MLPSpec((4, 5)), MLPSpec((6, 4)))
    with pytest.raises(ConfigError, match="at least one feature"):
        RadianceSpec(MLPSpec((4, 5)), MLPSpec((5, 3)))


def test_unsorted_or_foreign_rays_are_refused_by_the_kernel(rng: torch.Generator) -> None:
    if _library.cpu_library() is None:
        pytest.skip("no native library: install a C++ compiler")
    case = make(rng, "odd", 4, 3)
    with _library.use_backend("native"):
        for rays in ([0, 2, 1, 2], [0, 1, 2, 3], [-1, 0, 1, 2]):
            case.rays = torch.tensor(rays)
            with pytest.raises(BackendError, match="sorted"):
                case.outputs()
