"""Marching, packing and the scan of counts under the host emulation against the oracle."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch

from posemap_fast.ops.march import MarchSpec
from posemap_fast.ops.reference import march as reference
from posemap_fast.seeding import step_generator

from .guarded import Guarded

SPECS = {
    "one_cascade": MarchSpec(32, 1, 0.02, 0.02, 0.0, 4096),
    "three_cascades": MarchSpec(16, 3, 0.008, 0.008, 0.0, 4096),
    "step_longer_than_inner_cells": MarchSpec(16, 3, 0.03, 0.03, 0.0, 4096),
    "cone": MarchSpec(16, 3, 0.006, 0.1, 0.05, 4096),
    "few_samples": MarchSpec(16, 1, 0.01, 0.01, 0.0, 7),
}
COUNTS = [0, 1, 31, 32, 33, 127, 128, 129, 300]  # a block takes 128 rays
UNIT_BOX = [[0.0, 0, 0], [1, 1, 1]]
Rays = dict[str, torch.Tensor]
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ray_offsets, t_starts, t_ends


def make_rays(n: int, dtype: torch.dtype = torch.float64) -> Rays:
    """Rays from inside and outside the cube; every fifth looks away from it."""
    g = step_generator(n, "march_cuda")
    rays_o = torch.rand(n, 3, generator=g, dtype=torch.float64) * 2 - 0.5
    rays_d = torch.rand(n, 3, generator=g, dtype=torch.float64) * 0.8 + 0.1 - rays_o
    rays_d = torch.nn.functional.normalize(rays_d, dim=1)
    rays_d[::5] *= -1
    near, far = torch.zeros(n, dtype=torch.float64), torch.full((n,), 3.0, dtype=torch.float64)
    jitter = torch.rand(n, generator=g, dtype=torch.float64)
    box = torch.tensor(UNIT_BOX, dtype=torch.float64)
    rays = {"rays_o": rays_o, "rays_d": rays_d, "near": near, "far": far, "jitter": jitter, "aabb": box}
    return {key: value.to(dtype) for key, value in rays.items()}


def make_bits(spec: MarchSpec, share: float) -> torch.Tensor:
    occs = torch.rand(spec.n_cells, generator=step_generator(1, f"bits/{spec.resolution}/{spec.n_cascades}"))
    return reference.pack_bits(occs, 1.0 - share)


def march(emulated: Any, rays: Rays, bits: torch.Tensor, spec: MarchSpec, has_jitter: bool = True) -> Result:
    n, dtype = len(rays["rays_o"]), rays["rays_o"].dtype
    suffix = "f32" if dtype == torch.float32 else "f64"
    memory = Guarded()
    offsets = memory.new(n + 1, dtype=torch.int64)
    jitter = rays["jitter"] if has_jitter else None
    fixed = (*(rays[k] for k in ("rays_o", "rays_d", "near", "far")), jitter, rays["aabb"], bits, n, *astuple(spec))
    emulated.call(f"pmf_march_count_cuda_{suffix}", *fixed, offsets, emulated.scratch("pmf_scan_scratch_bytes", n))
    t_starts, t_ends = (memory.new(int(offsets[-1]), dtype=dtype) for _ in range(2))
    emulated.call(f"pmf_march_fill_cuda_{suffix}", *fixed, offsets, t_starts, t_ends)
    memory.expect_clean_margins()
    return offsets, t_starts, t_ends


def oracle(rays: Rays, bits: torch.Tensor, spec: MarchSpec, has_jitter: bool = True) -> Result:
    wide = {key: value.double() for key, value in rays.items()}
    jitter = wide.pop("jitter") if has_jitter else wide.pop("jitter") * 0
    return reference.march(**wide, bitfield=bits, jitter=jitter, spec=spec)


def expect_same(got: Result, want: Result) -> None:
    assert torch.equal(got[0], want[0])
    for one, other in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("share", [2.0, 0.3, 0.0])
def test_float64_equals_the_oracle(emulated: Any, schedule: Any, spec: MarchSpec, share: float) -> None:
    bits = make_bits(spec, share)
    for n in COUNTS:
        rays = make_rays(n)
        expect_same(march(emulated, rays, bits, spec), oracle(rays, bits, spec))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_float32_differs_from_float64_only_at_cell_faces(emulated: Any, schedule: Any, spec: MarchSpec) -> None:
    bits, rays = make_bits(spec, 0.5), make_rays(300, torch.float32)
    got, want = march(emulated, rays, bits, spec), oracle(rays, bits, spec)
    same = got[0].diff() == want[0].diff()
    assert (~same).sum() <= max(1, 1e-3 * len(want[1]))
    for ray in same.nonzero()[:, 0].tolist():
        ours, theirs = (r[1][r[0][ray] : r[0][ray + 1]] for r in (got, want))
        assert ((theirs - ours).abs() > 1e-4).sum() <= 2
    assert bool(got[1].isfinite().all()) and bool((got[2] > got[1]).all())


def test_jitter_may_be_missing(emulated: Any, schedule: Any) -> None:
    spec = SPECS["three_cascades"]
    bits, rays = make_bits(spec, 0.3), make_rays(40)
    expect_same(march(emulated, rays, bits, spec, False), oracle(rays, bits, spec, False))


def test_hostile_rays_get_no_samples_and_leave_others_alone(emulated: Any, schedule: Any) -> None:
    spec = SPECS["cone"]
    bits, rays = make_bits(spec, 2.0), make_rays(40)
    clean = march(emulated, rays, bits, spec)
    nan, inf = float("nan"), float("inf")
    rays["rays_o"][1, 0], rays["rays_d"][2, 1], rays["near"][3], rays["far"][4] = nan, inf, nan, nan
    rays["jitter"][6], rays["rays_d"][7], rays["rays_o"][8] = inf, 0.0, 1e300
    rays["far"][9] = inf
    got = march(emulated, rays, bits, spec)
    expect_same(got, oracle(rays, bits, spec))
    counts, before = got[0].diff(), clean[0].diff()
    assert not bool(counts[[1, 2, 3, 4, 6, 8]].any()) and torch.equal(counts[9:], before[9:])


def test_box_smaller_and_larger_than_the_cube(emulated: Any, schedule: Any) -> None:
    spec = SPECS["one_cascade"]
    bits, rays = make_bits(spec, 2.0), make_rays(60)
    for box in ([[0.25, 0.3, 0.1], [0.5, 0.9, 0.7]], [[-5.0, -5, -5], [9, 9, 9]], [[0.5, 0, 0], [0.4, 1, 1]]):
        rays["aabb"] = torch.tensor(box, dtype=torch.float64)
        expect_same(march(emulated, rays, bits, spec), oracle(rays, bits, spec))


@pytest.mark.parametrize("n", [4095, 4096, 4097, 9000])
def test_offsets_of_several_tiles_of_the_scan(emulated: Any, schedule: Any, n: int) -> None:
    """A tile has 4096 rays; most rays here have at most seven samples."""
    spec = MarchSpec(4, 1, 0.1, 0.1, 0.0, 7)
    bits, rays = make_bits(spec, 0.5), make_rays(n)
    assert emulated.size("pmf_scan_scratch_bytes", n) == 8 * ((n + 4095) // 4096)
    expect_same(march(emulated, rays, bits, spec), oracle(rays, bits, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_packed_bits_equal_the_oracle(emulated: Any, schedule: Any, dtype: torch.dtype) -> None:
    suffix = "f32" if dtype == torch.float32 else "f64"
    for n_bytes in (0, 1, 3, 4, 5, 31, 32, 33, 700):
        occs = torch.rand(8 * n_bytes, generator=step_generator(n_bytes, "pack"), dtype=torch.float64).to(dtype)
        occs[::7] = torch.nan
        occs[1::7] = 0.5  # exactly at the threshold: not above it
        memory = Guarded()
        bits = memory.new(n_bytes, dtype=torch.uint8)
        emulated.call(f"pmf_pack_bits_cuda_{suffix}", occs, bits, n_bytes, 0.5)
        memory.expect_clean_margins()
        assert torch.equal(bits, reference.pack_bits(occs, 0.5))
