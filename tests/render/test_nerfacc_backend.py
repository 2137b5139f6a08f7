"""The nerfacc backend: its layouts, and the adapter on a small stand-in of nerfacc's documented functions.

`FakeNerfacc` is written from nerfacc 0.5.3's documentation (`grid.py`, `volrend.py`, the preamble of `grid.cu`) in
plain torch on the CPU, one ray after the other, and asserts what the real kernels need. The tests marked `cuda` run
the real one against the native backend.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posemap_fast.errors import BackendError, ShapeError
from posemap_fast.ops import MarchSpec, pack_bits
from posemap_fast.ops.reference.march import clip_rays, step_at
from posemap_fast.optional import NERFACC
from posemap_fast.render import RENDER_BACKENDS, OccupancyConfig, OccupancyGrid
from posemap_fast.render.backends import MarchingBackend
from posemap_fast.render.nerfacc_backend import NerfaccKernels
from posemap_fast.render.nerfacc_layout import (
    offsets_of_counts,
)


def _first_level(point: torch.Tensor, aabbs: torch.Tensor) -> int | None:
    """The level that decides at `point`: the first whose box holds it."""
    inside = ((point >= aabbs[:, :3]) & (point <= aabbs[:, 3:])).all(1).nonzero()
    return int(inside[0]) if len(inside) else None


def _traverse_ray(
    origin: torch.Tensor,
    direction: torch.Tensor,
    binaries: torch.Tensor,
    aabbs: torch.Tensor,
    near: float,
    far: float,
    step_size: float,
    cone_angle: float,
    limit: int,
) -> list[tuple[float, float]]:
    """Intervals of one ray whose middle is in an occupied cell of the level that decides there."""
    found: list[tuple[float, float]] = []
    t, resolution = near, torch.tensor(binaries.shape[1:])
    while len(found) < limit:
        dt = max(t * cone_angle, step_size)
        middle = t + dt / 2
        if middle >= far:
            break
        point = origin + middle * direction
        level = _first_level(point, aabbs)
        if level is not None:
            low, high = aabbs[level, :3], aabbs[level, 3:]
            x, y, z = ((point - low) / (high - low) * resolution).long().clamp(max=resolution - 1).tolist()
            if binaries[level, x, y, z]:
                found.append((t, t + dt))
        t += dt
    return found


def _edges(intervals: list[tuple[float, float]]) -> tuple[list[float], list[bool], list[bool]]:
    """Values and marks; an interval that begins where the last one ended shares that edge."""
    values: list[float] = []
    left: list[bool] = []
    right: list[bool] = []
    for begin, end in intervals:
        if values and values[-1] == begin:
            left[-1] = True
        else:
            values, left, right = [*values, begin], [*left, True], [*right, False]
        values, left, right = [*values, end], [*left, False], [*right, True]
    return values, left, right


class FakeNerfacc:
    """The functions of nerfacc that the adapter calls."""

    @staticmethod
    def traverse_grids(
        rays_o: torch.Tensor,
        rays_d: torch.Tensor,
        binaries: torch.Tensor,
        aabbs: torch.Tensor,
        near_planes: torch.Tensor,
        far_planes: torch.Tensor,
        step_size: float = 1e-3,
        cone_angle: float = 0.0,
        traverse_steps_limit: int | None = None,
    ) -> tuple[Any, Any, None]:
        n_rays = len(rays_o)
        assert n_rays > 0, "divides by the number of threads"
        for tensor in (rays_o, rays_d, aabbs, near_planes, far_planes):
            assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all()), "would march for ever"
        assert binaries.dtype == torch.bool and binaries.dim() == 4 and aabbs.shape == (len(binaries), 6)
        assert step_size > 0 and near_planes.shape == far_planes.shape == (n_rays,)
        limit = traverse_steps_limit or 1 << 30
        rows = [
            _traverse_ray(o, d, binaries, aabbs, float(near), float(far), step_size, cone_angle, limit)
            for o, d, near, far in zip(rays_o, rays_d, near_planes, far_planes, strict=True)
        ]
        counts = torch.tensor([len(row) for row in rows])
        edges = [_edges(row) for row in rows]
        values, left, right = ([item for edge in edges for item in edge[k]] for k in range(3))
        intervals = SimpleNamespace(
            vals=torch.tensor(values),
            is_left=torch.tensor(left, dtype=torch.bool),
            is_right=torch.tensor(right, dtype=torch.bool),
        )
        packed_info = torch.stack([counts.cumsum(0) - counts, counts], dim=-1)
        rays = torch.repeat_interleave(torch.arange(n_rays), counts)
        return intervals, SimpleNamespace(packed_info=packed_info, ray_indices=rays), None

    @staticmethod
    def render_transmittance_from_density(
        t_starts: torch.Tensor, t_ends: torch.Tensor, sigmas: torch.Tensor, packed_info: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert len(sigmas) > 0 and packed_info.dtype == torch.int64 and packed_info.shape[1] == 2
        assert int(packed_info[:, 1].sum()) == len(sigmas)
        taus = sigmas * (t_ends - t_starts)
        parts = [taus[start : start + count] for start, count in packed_info.tolist()]
        sums = torch.cat([part.cumsum(0) - part for part in parts])
        return torch.exp(-sums), 1.0 - torch.exp(-taus)

    @classmethod
    def render_weight_from_density(cls, *samples: torch.Tensor, packed_info: torch.Tensor) -> tuple[torch.Tensor, ...]:
        transmittance, alphas = cls.render_transmittance_from_density(*samples, packed_info)
        return transmittance * alphas, transmittance, alphas

    @staticmethod
    def accumulate_along_rays(
        weights: torch.Tensor, values: torch.Tensor | None, ray_indices: torch.Tensor, n_rays: int
    ) -> torch.Tensor:
        source = weights[:, None] if values is None else weights[:, None] * values
        return torch.zeros(n_rays, source.shape[1], device=source.device).index_add(0, ray_indices, source)


FAKE = NerfaccKernels(lambda: FakeNerfacc, device_type="cpu")
NATIVE = RENDER_BACKENDS.get("native")


def random_bits(spec: MarchSpec, share: float = 0.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return pack_bits(torch.rand(spec.n_cells, generator=generator), 1.0 - share)


def random_rays(n: int) -> tuple[torch.Tensor, ...]:
    """Origins in and around the cube, directions, near, far, and a box smaller than the cube."""
    generator = torch.Generator().manual_seed(2)
    rays_o = torch.rand(n, 3, generator=generator) * 1.2 - 0.1
    rays_d = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
    near, far = torch.full((n,), 0.05), torch.full((n,), 1e4)
    return rays_o, rays_d, near, far, torch.tensor([[0.05, 0.0, 0.1], [1.0, 0.9, 1.0]])


def lattice_keys(result: Any, rays: tuple[torch.Tensor, ...], spec: MarchSpec, jitter: torch.Tensor) -> set[int]:
    """Ray and place in the lattice of every whole interval; those that the exit has cut are left out."""
    entry, exit_, _ = clip_rays(*rays)
    counts = result.ray_offsets.diff()
    ray = torch.repeat_interleave(counts)
    first = (entry + jitter * step_at(entry, spec))[ray]
    index = ((result.t_starts - first) / spec.step_min).round().long()
    torch.testing.assert_close(first + index * spec.step_min, result.t_starts, rtol=0, atol=1e-4)  # float32 sums
    assert bool((result.t_ends <= exit_[ray] + 1e-6).all())
    is_whole = result.t_starts + 1.5 * spec.step_min < exit_[ray]
    return set((ray[is_whole] * 100_000 + index[is_whole]).tolist())


def assert_same_march(kernels: Any, spec: MarchSpec, device: str, n_rays: int) -> None:
    """The same whole intervals as the native backend, but for midpoints on a cell's face."""
    rays, bits = tuple(t.to(device) for t in random_rays(n_rays)), random_bits(spec).to(device)
    jitter = torch.rand(n_rays, generator=torch.Generator().manual_seed(3)).to(device)
    found = lattice_keys(kernels.march(*rays, bits, spec, jitter), rays, spec, jitter)
    expected = lattice_keys(NATIVE.march(*rays, bits, spec, jitter), rays, spec, jitter)
    assert len(expected) > 3 * n_rays
    assert len(found ^ expected) <= 1e-3 * len(expected)


SPECS = [
    MarchSpec(resolution=16, n_cascades=1, step_min=1 / 60, step_max=1 / 60),
    MarchSpec(resolution=16, n_cascades=3, step_min=1 / 90, step_max=1 / 90),
    MarchSpec(resolution=16, n_cascades=3, step_min=1 / 40, step_max=1 / 40),  # longer than the finest cells
]


# ---- marching


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.n_cascades} cascades, step {s.step_min:.3f}")
def test_marching_gives_the_samples_of_the_native_backend(spec: MarchSpec) -> None:
    assert_same_march(FAKE, spec, "cpu", n_rays=100)


def test_last_interval_is_cut_at_the_exit() -> None:
    spec = MarchSpec(resolution=16, n_cascades=1, step_min=0.3, step_max=0.3)
    full = torch.full((spec.n_cells // 8,), 255, dtype=torch.uint8)
    origin, direction = torch.tensor([[0.0, 0.5, 0.5]]), torch.tensor([[1.0, 0.0, 0.0]])
    box = torch.tensor([[0.0] * 3, [0.8, 1.0, 1.0]])
    result = FAKE.march(origin, direction, torch.zeros(1), torch.full((1,), 9.0), box, full, spec)
    torch.testing.assert_close(result.t_starts, torch.tensor([0.0, 0.3, 0.6]))
    torch.testing.assert_close(result.t_ends, torch.tensor([0.3, 0.6, 0.8]))
    assert result.ray_offsets.tolist() == [0, 3]


def test_steps_grow_with_the_distance_in_a_full_grid_as_in_the_native_backend() -> None:
    spec = MarchSpec(resolution=16, n_cascades=2, step_min=0.01, step_max=1.0, cone_angle=0.05)
    full = torch.full((spec.n_cells // 8,), 255, dtype=torch.uint8)
    rays = random_rays(50)
    found, expected = (b.march(*rays, full, spec, None) for b in (FAKE, NATIVE))
    assert set((expected.ray_offsets.diff() - found.ray_offsets.diff()).tolist()) <= {0, 1}  # the rest before the exit
    for ray in range(50):
        ours = found.t_starts[found.ray_offsets[ray] : found.ray_offsets[ray + 1]]
        theirs = expected.t_starts[expected.ray_offsets[ray] :][: len(ours)]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_rays_that_miss_or_are_not_finite_have_no_samples() -> None:
    spec = SPECS[0]
    full = torch.full((spec.n_cells // 8,), 255, dtype=torch.uint8)
    nan, inf = float("nan"), float("inf")
    rays_o = torch.tensor([[5.0, 5, 5], [nan, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]])
    rays_d = torch.tensor([[0.0, 0, 1], [0, 0, 1], [nan, 0, 1], [0, 0, 1], [0, 0, 1]])
    near, far = torch.tensor([0.0, 0, 0, nan, 0]), torch.full((5,), inf)
    result = FAKE.march(rays_o, rays_d, near, far, torch.tensor([[0.0] * 3, [1.0] * 3]), full, spec)
    assert result.ray_offsets.diff().tolist() == [0, 0, 0, 0, 30]


def test_no_rays_give_no_samples() -> None:
    spec = SPECS[0]
    empty = torch.zeros(0, 3)
    result = FAKE.march(empty, empty, empty[:, 0], empty[:, 0], torch.zeros(2, 3), random_bits(spec), spec)
    assert result.ray_offsets.tolist() == [0] and result.t_starts.shape == result.t_ends.shape == (0,)


def test_the_nearest_samples_are_kept_when_there_are_too_many() -> None:
    spec = MarchSpec(resolution=16, n_cascades=1, step_min=1 / 60, step_max=1 / 60, max_samples=5)
    result, expected = (b.march(*random_rays(40), random_bits(spec), spec) for b in (FAKE, NATIVE))
    is_full = result.ray_offsets.diff() == 5
    assert int(is_full.sum()) > 10 and int(result.ray_offsets.diff().max()) == 5
    starts = [r.t_starts[r.ray_offsets[:-1][is_full][:, None] + torch.arange(5)] for r in (result, expected)]
    torch.testing.assert_close(*starts, rtol=0, atol=1e-5)


def test_bits_are_unpacked_again_only_when_they_change() -> None:
    spec = SPECS[0]
    kernels = NerfaccKernels(lambda: FakeNerfacc, device_type="cpu")
    grid = OccupancyGrid(OccupancyConfig(resolution=16), 1, spec.step_min)
    first = kernels._binaries(grid.bitfield, spec)
    assert kernels._binaries(grid.bitfield, spec) is first and bool(first.all())
    grid.keep_only(torch.zeros(spec.n_cells, dtype=torch.bool))
    assert not bool(kernels._binaries(grid.bitfield, spec).any())


# ---- compositing


def packed_samples(device: str = "cpu") -> dict[str, torch.Tensor]:
    """40 rays, some empty, some opaque; features of 7 channels."""
    generator = torch.Generator().manual_seed(5)
    counts = torch.randint(0, 12, (40,), generator=generator)
    counts[[0, 7, 39]] = 0
    n = int(counts.sum())
    steps = torch.rand(n, generator=generator) * 0.1
    t_ends = steps.cumsum(0)
    samples = {
        "sigmas": torch.rand(n, generator=generator) * 60.0,
        "t_starts": t_ends - steps,
        "t_ends": t_ends,
        "rgbs": torch.rand(n, 3, generator=generator),
        "ray_offsets": offsets_of_counts(counts),
        "features": torch.randn(n, 7, generator=generator),
    }
    return {name: tensor.to(device) for name, tensor in samples.items()}


def assert_same_composite(kernels: Any, device: str, early_stop_eps: float) -> None:
    """Values and all gradients of the native backend."""
    results = []
    for backend in (kernels, NATIVE):
        samples = packed_samples(device)
        inputs = [t.requires_grad_(True) for t in samples.values() if t.is_floating_point()]
        sigmas, starts, ends, rgbs, features = inputs
        out = backend.composite(sigmas, starts, ends, rgbs, samples["ray_offsets"], features, early_stop_eps)
        generator = torch.Generator().manual_seed(6)
        loss = sum((o * torch.randn(o.shape, generator=generator).to(device)).sum() for o in out)
        results.append([*out, *torch.autograd.grad(loss, inputs)])
    for ours, wanted in zip(*results, strict=True):
        assert ours.shape == wanted.shape
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("early_stop_eps", [0.0, 1e-4, 0.3])
def test_compositing_agrees_with_the_native_backend_in_values_and_gradients(early_stop_eps: float) -> None:
    assert_same_composite(FAKE, "cpu", early_stop_eps)


def test_samples_behind_the_early_stop_have_no_weight() -> None:
    ones, offsets = torch.ones(4), torch.tensor([0, 4])
    starts = torch.arange(4.0)
    out = FAKE.composite(ones * 0.7, starts, starts + 1, torch.ones(4, 3), offsets, None, 0.3)
    assert (out.weights > 0).tolist() == [True, True, False, False]  # T = 1, 0.497, 0.247
    assert out.features.shape == (1, 0)


def test_no_samples_composite_to_nothing_and_keep_the_graph() -> None:
    sigmas = torch.zeros(0, requires_grad=True)
    empty, offsets = torch.zeros(0), torch.zeros(4, dtype=torch.int64)
    out = FAKE.composite(sigmas, empty, empty, torch.zeros(0, 3), offsets, torch.zeros(0, 2))
    assert [tuple(o.shape) for o in out] == [(3, 3), (3,), (3,), (3, 2), (0,)]
    out.opacity.sum().backward()
    assert sigmas.grad is not None
    assert FAKE.compact(sigmas, empty, empty, offsets).ray_offsets.tolist() == [0, 0, 0, 0]


def test_a_nan_stays_on_its_ray_and_is_kept() -> None:
    samples = packed_samples()
    offsets = samples["ray_offsets"]
    ray = int(offsets.diff().argmax())
    samples["sigmas"][offsets[ray]] = float("nan")
    rgb = FAKE.composite(*(samples[k] for k in ("sigmas", "t_starts", "t_ends", "rgbs", "ray_offsets"))).rgb
    assert rgb.isnan().any(1).nonzero().flatten().tolist() == [ray]
    arguments = [samples[k] for k in ("sigmas", "t_starts", "t_ends", "ray_offsets")]
    kept, expected = FAKE.compact(*arguments), NATIVE.compact(*arguments)
    assert torch.equal(kept.indices, expected.indices) and torch.equal(kept.ray_offsets, expected.ray_offsets)


@pytest.mark.parametrize(("transmittance_eps", "alpha_eps"), [(0.0, 0.0), (0.01, 0.0), (0.2, 0.5)])
def test_compaction_keeps_what_the_native_backend_keeps(transmittance_eps: float, alpha_eps: float) -> None:
    samples = packed_samples()
    arguments = [samples[k] for k in ("sigmas", "t_starts", "t_ends", "ray_offsets")]
    found, expected = (b.compact(*arguments, transmittance_eps, alpha_eps) for b in (FAKE, NATIVE))
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.ray_offsets, expected.ray_offsets)


# ---- the whole renderer, and what is refused


def test_renderer_gives_the_same_picture_on_it(tiny_map, camera, poses) -> None:
    from posemap_fast.geometry import camera_rays

    nerfp, renderer = tiny_map
    rays = camera_rays(camera, poses[0], torch.rand(40, 2, generator=torch.Generator().manual_seed(9)) * 36.0)
    with torch.no_grad():
        expected = renderer.render_rays(nerfp, *rays, want_posemap=True)
        renderer.backend = MarchingBackend(FAKE.march, FAKE.compact, FAKE.composite)
        found = renderer.render_rays(nerfp, *rays, want_posemap=True)
    # the two differ by less than half a step before the exit
    for name, bound in (("rgb", 0.02), ("opacity", 0.02), ("depth", 0.1), ("posemap", 0.05)):
        assert float((getattr(found, name) - getattr(expected, name)).abs().max()) < bound, name


def test_other_devices_and_dtypes_are_refused() -> None:
    kernels = NerfaccKernels(lambda: FakeNerfacc)
    samples = packed_samples()
    arguments = [samples[k] for k in ("sigmas", "t_starts", "t_ends", "ray_offsets")]
    with pytest.raises(BackendError, match="computes on cuda only; got tensors on cpu"):
        kernels.compact(*arguments)
    with pytest.raises(ShapeError, match="float32"):
        FAKE.march(*(t.double() for t in random_rays(3)), random_bits(SPECS[0]), SPECS[0])


def test_nerfacc_is_imported_at_the_first_call_only(monkeypatch) -> None:
    calls = []

    def load() -> Any:
        calls.append(1)
        return FakeNerfacc

    kernels = NerfaccKernels(load, device_type="cpu")
    assert calls == []
    for _ in range(2):
        kernels.march(*random_rays(3), random_bits(SPECS[0]), SPECS[0])
    assert calls == [1]


# ---- the real library


@pytest.fixture
def nerfacc() -> NerfaccKernels:
    try:
        NERFACC.load()
    except BackendError as error:
        pytest.skip(str(error))
    return NerfaccKernels(NERFACC.load)


@pytest.mark.cuda
@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.n_cascades} cascades, step {s.step_min:.3f}")
def test_real_library_marches_as_the_native_backend(nerfacc: NerfaccKernels, spec: MarchSpec) -> None:
    assert_same_march(nerfacc, spec, "cuda", n_rays=2000)


@pytest.mark.cuda
@pytest.mark.parametrize("early_stop_eps", [0.0, 1e-4, 0.3])
def test_real_library_composites_as_the_native_backend(nerfacc: NerfaccKernels, early_stop_eps: float) -> None:
    assert_same_composite(nerfacc, "cuda", early_stop_eps)
