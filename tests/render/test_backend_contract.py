"""Contract of every registered render backend, on each device it runs on, against the reference on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from posemap_fast.backends import why_not
from posemap_fast.ops import MarchSpec, pack_bits
from posemap_fast.render import RENDER_BACKENDS
from posemap_fast.render.backends import MarchingBackend

SPEC = MarchSpec(resolution=16, n_cascades=2, step_min=1 / 80, step_max=1 / 80)
N_RAYS = 60


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no CUDA device")
    return request.param


@pytest.fixture(params=RENDER_BACKENDS.names())
def backend(request: pytest.FixtureRequest, device: str) -> Iterator[MarchingBackend]:
    reason = why_not(request.param, torch.device(device))
    if reason:
        pytest.skip(reason)
    yield RENDER_BACKENDS.get(request.param)


def scene(device: str) -> list[torch.Tensor]:
    """Rays that begin inside the cube, near, far, box and half-full occupancy bits."""
    generator = torch.Generator().manual_seed(7)
    rays_o = 0.1 + 0.8 * torch.rand(N_RAYS, 3, generator=generator)
    rays_d = torch.nn.functional.normalize(torch.randn(N_RAYS, 3, generator=generator), dim=1)
    near, far = torch.full((N_RAYS,), 0.02), torch.full((N_RAYS,), 1e4)
    bits = pack_bits(torch.rand(SPEC.n_cells, generator=generator), 0.5)
    box = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    return [t.to(device) for t in (rays_o, rays_d, near, far, box, bits)]


def test_march_gives_packed_sorted_samples_of_the_documented_types(backend: MarchingBackend, device: str) -> None:
    result = backend.march(*scene(device), SPEC, None)
    offsets, starts, ends = result.ray_offsets, result.t_starts, result.t_ends
    assert offsets.dtype == torch.int64 and offsets.shape == (N_RAYS + 1,)
    assert int(offsets[0]) == 0 and int(offsets[-1]) == len(starts) == len(ends) > N_RAYS
    assert starts.dtype == ends.dtype == torch.float32 and starts.device.type == device
    assert bool((ends > starts).all())
    is_first = torch.zeros(len(starts), dtype=torch.bool, device=device)
    is_first[offsets[:-1][offsets.diff() > 0]] = True
    assert bool(((starts[1:] >= ends[:-1] - 1e-6) | is_first[1:]).all())


def test_render_chain_agrees_with_the_reference(backend: MarchingBackend, device: str) -> None:
    """The samples of the reference, compacted and composited with features, in values and gradients."""
    reference = RENDER_BACKENDS.get("reference")
    packed = reference.march(*scene("cpu"), SPEC, None)
    generator = torch.Generator().manual_seed(8)
    n = len(packed.t_starts)
    sigmas, rgbs = 80 * torch.rand(n, generator=generator), torch.rand(n, 3, generator=generator)
    features = torch.randn(n, 5, generator=generator)
    cotangents: list[torch.Tensor] = []
    results = []
    for one, where in ((reference, "cpu"), (backend, device)):
        starts, ends, offsets = (t.to(where) for t in (packed.t_starts, packed.t_ends, packed.ray_offsets))
        s, c, f = (t.to(where).requires_grad_(True) for t in (sigmas, rgbs, features))
        kept = one.compact(s.detach(), starts, ends, offsets, 1e-2)
        rows = kept.indices
        out = one.composite(s[rows], starts[rows], ends[rows], c[rows], kept.ray_offsets, f[rows], 1e-4)
        cotangents = cotangents or [torch.randn(o.shape, generator=generator) for o in out]
        loss = sum((o * t.to(where)).sum() for o, t in zip(out, cotangents, strict=True))
        results.append([rows, kept.ray_offsets, *out, *torch.autograd.grad(loss, (s, c, f))])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-4, atol=2e-4)


def test_features_are_optional(backend: MarchingBackend, device: str) -> None:
    ones = torch.ones(2, device=device)
    offsets = torch.tensor([0, 2, 2], device=device)
    out = backend.composite(ones, 0 * ones, ones, torch.ones(2, 3, device=device), offsets, None, 1e-4)
    assert out.features.shape == (2, 0) and float(out.opacity[1]) == 0.0
