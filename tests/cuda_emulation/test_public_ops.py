"""The public ops on the CUDA face, emulated here and on a GPU where there is one, against the reference on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from posemap_fast import ops
from posemap_fast.fields import FieldConfig, NeRFP
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.ops import HashGridSpec, MarchSpec, MLPSpec
from posemap_fast.ops._faces import Face, face_of, use_face
from posemap_fast.render import OccupancyConfig, RenderConfig, Renderer, render_views
from posemap_fast.seeding import step_generator

from .emulated_library import EmulatedLibrary, emulated_library

Tensors = tuple[torch.Tensor, ...]
# Relative, in the norm. Rounding to half moves one hidden value in a thousand across zero: its gate opens or shuts,
# and 0.1 % of the terms are 3 % of a norm. test_fused_mlp_cuda.py compares tightly, with an oracle that rounds alike.
HALF_ERROR = 0.05


@dataclass(frozen=True)
class Kernels:
    """Where the CUDA face runs."""

    device: torch.device
    emulated: EmulatedLibrary | None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Ops of this block run on the CUDA face."""
        with contextlib.ExitStack() as stack:
            if self.emulated is not None:
                stack.enter_context(use_face(Face("cuda", self.emulated.handle)))
            else:
                stack.enter_context(ops.use_backend("native"))
            face = face_of(torch.zeros(1, device=self.device))
            assert face is not None and face.device == "cuda"
            yield


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.cuda)])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "emulated":
        request.getfixturevalue("emulated")
        return Kernels(torch.device("cpu"), emulated_library())
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return Kernels(torch.device("cuda"), None)


def results(function: Callable[..., Tensors], inputs: Tensors, device: torch.device) -> Tensors:
    """Outputs, and gradients of a random weighting of the float ones, on the CPU."""
    leaves = tuple(t.detach().to(device).requires_grad_(t.requires_grad) for t in inputs)
    outputs = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    generator = step_generator(0, "cotangents")
    terms = [
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
        for o in outputs
        if o.requires_grad
    ]
    grads = torch.autograd.grad(torch.stack(terms).sum(), wanted) if terms else ()
    return tuple(t.detach().cpu() for t in (*outputs, *grads))


def compare(kernels: Kernels, function: Callable[..., Tensors], inputs: Tensors, **tolerance: float) -> None:
    """The CUDA face against the reference, values and gradients."""
    with kernels.active():
        got = results(function, inputs, kernels.device)
    with ops.use_backend("reference"):
        want = results(function, inputs, torch.device("cpu"))
    assert len(got) == len(want)
    for value, expected in zip(got, want, strict=True):
        torch.testing.assert_close(value, expected, equal_nan=True, **tolerance)


def rays_of_samples(counts: list[int], dtype: torch.dtype, n_channels: int) -> tuple[Tensors, torch.Tensor]:
    """sigmas, starts, ends, rgbs, features (leaves) and offsets."""
    rng, total = step_generator(0, f"samples{counts}"), sum(counts)
    starts = torch.rand(total, generator=rng, dtype=dtype).cumsum(0)
    ends = starts + 0.05 + 0.1 * torch.rand(total, generator=rng, dtype=dtype)
    sigmas = 3 * torch.rand(total, generator=rng, dtype=dtype)
    rgbs = torch.rand(total, 3, generator=rng, dtype=dtype)
    features = torch.randn(total, n_channels, generator=rng, dtype=dtype)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return tuple(t.requires_grad_() for t in (sigmas, starts, ends, rgbs, features)), offsets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 33, 300])
def test_hash_encode(kernels: Kernels, n: int, dtype: torch.dtype) -> None:
    rng, spec = step_generator(0, "hash"), HashGridSpec(5, 2, 8, 4, 40)
    x = torch.rand(n, 3, generator=rng, dtype=dtype).requires_grad_()
    table = torch.randn(spec.n_entries, 2, generator=rng, dtype=dtype).requires_grad_()
    tolerance = {"rtol": 2e-3, "atol": 2e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    compare(kernels, lambda x, table: (ops.hash_encode(x, table, spec),), (x, table), **tolerance)


@pytest.mark.parametrize("n", [0, 33, 300])
def test_hash_encode_of_a_half_table(kernels: Kernels, n: int) -> None:
    rng, spec = step_generator(0, "hash"), HashGridSpec(5, 2, 8, 4, 40)
    x = torch.rand(n, 3, generator=rng).requires_grad_()
    table = torch.randn(spec.n_entries, 2, generator=rng).half().requires_grad_()
    compare(kernels, lambda x, table: (ops.hash_encode(x, table, spec),), (x, table), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_sh_encode(kernels: Kernels, degree: int) -> None:
    dirs = torch.randn(300, 3, generator=step_generator(0, "sh"), dtype=torch.float64).requires_grad_()
    compare(kernels, lambda d: (ops.sh_encode(d, degree),), (dirs,), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("counts", [[], [0], [5, 0, 33, 1, 64, 0], [200]])
@pytest.mark.parametrize("n_channels", [0, 3, 33])
def test_composite(kernels: Kernels, counts: list[int], n_channels: int) -> None:
    inputs, offsets = rays_of_samples(counts, torch.float64, n_channels)

    def run(sigmas: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, *colours: torch.Tensor) -> Tensors:
        return tuple(
            ops.composite(sigmas, starts, ends, colours[0], offsets.to(sigmas.device), colours[1], early_stop_eps=1e-3)
        )

    compare(kernels, run, inputs, rtol=1e-9, atol=1e-9)


def test_compact(kernels: Kernels) -> None:
    inputs, offsets = rays_of_samples([5, 0, 33, 1, 64, 0, 300], torch.float64, 0)
    plain = tuple(t.detach() for t in inputs[:3])

    def run(*samples: torch.Tensor) -> Tensors:
        kept = ops.compact(*samples, offsets.to(samples[0].device), 1e-2)
        return kept.indices, kept.ray_offsets

    compare(kernels, run, plain, rtol=0, atol=0)


def test_march(kernels: Kernels) -> None:
    rng, spec = step_generator(0, "march"), MarchSpec(16, 2, 0.01, 0.05, 0.004, 256)
    occupied = torch.rand(spec.n_cells, generator=rng, dtype=torch.float64)
    origins = torch.rand(70, 3, generator=rng, dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.randn(70, 3, generator=rng, dtype=torch.float64), dim=1)
    jitter = torch.rand(70, generator=rng, dtype=torch.float64)

    def run(o: torch.Tensor, d: torch.Tensor, occs: torch.Tensor, j: torch.Tensor) -> Tensors:
        box = torch.tensor([[0.0] * 3, [1.0] * 3], dtype=o.dtype, device=o.device)
        near, far = o.new_zeros(len(o)), o.new_full((len(o),), 10.0)
        bits = ops.pack_bits(occs, 0.7)
        return bits, *ops.march(o, d, near, far, box, bits, spec, j)

    compare(kernels, run, (origins, directions, occupied, jitter), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 33, 150])
@pytest.mark.parametrize("per_ray", [False, True])
def test_fused_mlp(kernels: Kernels, n: int, per_ray: bool) -> None:
    rng, spec = step_generator(0, f"mlp{n}"), MLPSpec((32 + 8, 64, 64, 3))
    x = torch.randn(32, n, generator=rng).t().requires_grad_()
    extra = torch.randn(7 if per_ray else n, 8, generator=rng).requires_grad_()
    params = torch.cat([torch.randn(o * i, generator=rng) / i**0.5 for o, i in spec.layer_shapes]).requires_grad_()
    index = torch.randint(7, (n,), generator=rng).sort().values if per_ray else None

    def run(x: torch.Tensor, params: torch.Tensor, extra: torch.Tensor) -> Tensors:
        rows = None if index is None else index.to(x.device)
        return (ops.fused_mlp(x, params, spec, extra, rows),)

    with kernels.active():
        got = results(run, (x, params, extra), kernels.device)
    with ops.use_backend("reference"):
        want = results(
            run, tuple(t.detach().double().requires_grad_() for t in (x, params, extra)), torch.device("cpu")
        )
    for value, expected in zip(got, want, strict=True):  # in the norm: rounding may open or shut a gate next to zero
        error = (value.double() - expected.double()).norm()
        assert error <= HALF_ERROR * expected.double().norm()


def test_wide_layers_and_float64_fall_back_to_the_reference(kernels: Kernels) -> None:
    wide = MLPSpec((4, 300, 2))
    x, params = torch.randn(5, 4, device=kernels.device), torch.randn(wide.n_params, device=kernels.device)
    with kernels.active():
        got = ops.fused_mlp(x, params, wide)
        exact = ops.fused_mlp(x.double(), params.double(), wide)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_whole_view_on_the_cuda_face_equals_the_reference(kernels: Kernels) -> None:
    """March, encode, networks, compaction, compositing and deferred projection together."""
    frame = SceneFrame(scale=0.25, offset=torch.full((3,), 0.5))
    config = FieldConfig(
        n_levels=4,
        log2_hashmap_size=10,
        base_resolution=4,
        finest_resolution=16,
        hidden=16,
        geo_features=7,
        sh_degree=2,
    )
    torch.manual_seed(0)
    nerfp = NeRFP(config, frame)
    torch.nn.init.uniform_(nerfp.field.grid_parameters()[0], -1, 1)
    camera = Camera(32, 24, 30.0, 30.0, 16.0, 12.0)
    views = []
    for device in (torch.device("cpu"), kernels.device):
        renderer = Renderer(RenderConfig(steps_per_unit=64, occupancy=OccupancyConfig(resolution=16)), frame, 0.01)
        renderer.occupancy.to(device)
        pose = torch.eye(4, device=device)[None]
        codes = torch.zeros(1, config.appearance_dim, device=device)
        context = ops.use_backend("reference") if not views else kernels.active()
        with context:
            views.append(render_views(renderer, nerfp.to(device), pose, camera, appearance=codes))
    want, got = views
    assert got.posemap is not None and want.posemap is not None
    torch.testing.assert_close(got.rgb.cpu(), want.rgb, rtol=0, atol=0.02)
    torch.testing.assert_close(got.depth.cpu(), want.depth, rtol=0.02, atol=0.02)
    scale = want.posemap.abs().max()
    torch.testing.assert_close(got.posemap.cpu() / scale, want.posemap / scale, rtol=0, atol=0.02)
