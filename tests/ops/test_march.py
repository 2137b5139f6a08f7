"""Marching: the lattice, the cascades, the box, and what happens to rays that are not rays."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.ops import _library
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops.march import MarchResult, MarchSpec, cells_of, march, occupied_at, pack_bits
from posemap_fast.ops.reference import march as reference
from posemap_fast.seeding import step_generator

UNIT_BOX = torch.tensor([[0.0, 0, 0], [1, 1, 1]], dtype=torch.float64)
SPECS = {
    "one_cascade": MarchSpec(32, 1, 0.01, 0.01, 0.0, 4096),
    "three_cascades": MarchSpec(16, 3, 0.004, 0.004, 0.0, 4096),
    "step_longer_than_inner_cells": MarchSpec(16, 3, 0.03, 0.03, 0.0, 4096),
    "cone": MarchSpec(16, 3, 0.003, 0.1, 0.05, 4096),
    "cells_make_no_blocks": MarchSpec(12, 2, 0.004, 0.004, 0.0, 4096),
}


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: no C++ compiler on this machine")
    with _library.use_backend(request.param):
        yield request.param


def make_rays(name: str, n: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Rays from inside and outside the cube towards its middle part, with jitter."""
    g = step_generator(0, name)
    rays_o = torch.rand(n, 3, generator=g, dtype=torch.float64) * 2 - 0.5
    towards = torch.rand(n, 3, generator=g, dtype=torch.float64) * 0.8 + 0.1 - rays_o
    rays_d = torch.nn.functional.normalize(towards, dim=1)
    near, far = torch.zeros(n, dtype=torch.float64), torch.full((n,), 3.0, dtype=torch.float64)
    jitter = torch.rand(n, generator=g, dtype=torch.float64)
    rays = {"rays_o": rays_o, "rays_d": rays_d, "near": near, "far": far, "aabb": UNIT_BOX, "jitter": jitter}
    return {key: value.to(dtype) for key, value in rays.items()}


def make_bits(spec: MarchSpec, share: float) -> torch.Tensor:
    occs = torch.rand(spec.n_cells, generator=step_generator(1, f"bits/{spec.resolution}/{spec.n_cascades}"))
    return pack_bits(occs, 1.0 - share)


def one_ray(
    origin: list[float], direction: list[float], spec: MarchSpec, bits: torch.Tensor, **other: float
) -> MarchResult:
    def scalar(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64)

    o, d = torch.tensor([origin], dtype=torch.float64), torch.tensor([direction], dtype=torch.float64)
    near, far = scalar(other.get("near", 0.0)), scalar(other.get("far", 10.0))
    return march(o, d, near, far, UNIT_BOX, bits, spec, scalar(other.get("jitter", 0.0)))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("share", [1.0, 0.5, 0.05, 0.003, 0.0])  # with .003 most blocks of 4^3 cells are empty
def test_native_equals_the_reference_in_float64(spec: MarchSpec, share: float) -> None:
    rays, bits = make_rays("oracle", 200), make_bits(spec, share)
    got = march(**rays, bitfield=bits, spec=spec)
    want = reference.march(**rays, bitfield=bits, spec=spec)
    assert torch.equal(got.ray_offsets, want[0])
    torch.testing.assert_close(got.t_starts, want[1], rtol=0, atol=1e-13)
    torch.testing.assert_close(got.t_ends, want[2], rtol=0, atol=1e-13)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_float32_differs_from_float64_only_at_cell_faces(spec: MarchSpec, backend: str) -> None:
    """A midpoint nearer to a face than float32 can tell may change sides: at most 1 sample in 1000."""
    bits, rays = make_bits(spec, 0.5), make_rays("float32", 300, torch.float32)
    want = reference.march(**{k: v.double() for k, v in rays.items()}, bitfield=bits, spec=spec)
    got = march(**rays, bitfield=bits, spec=spec)
    same = got.ray_offsets.diff() == want[0].diff()
    assert (~same).sum() <= max(1, 1e-3 * len(want[1]))
    for ray in same.nonzero()[:, 0].tolist():
        theirs, ours = (
            want[1][want[0][ray] : want[0][ray + 1]],
            got.t_starts[got.ray_offsets[ray] : got.ray_offsets[ray + 1]],
        )
        flipped = (theirs - ours).abs() > 1e-4
        assert flipped.sum() <= 2


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("share", [0.2, 0.003])
def test_sparse_samples_are_the_full_grids_samples_with_occupied_midpoints(
    spec: MarchSpec, dtype: torch.dtype, share: float, backend: str
) -> None:
    """Skipping an empty cell or a block of them leaves the lattice alone: the same numbers, bit for bit."""
    rays, bits = make_rays("subset", 100, dtype), make_bits(spec, share)
    full = march(**rays, bitfield=make_bits(spec, 2.0), spec=spec)
    sparse = march(**rays, bitfield=bits, spec=spec)
    every = list(zip(_ray_of(full), full.t_starts.tolist(), full.t_ends.tolist(), strict=True))
    ray = torch.tensor(_ray_of(full))
    middle = rays["rays_o"][ray] + ((full.t_starts + full.t_ends) / 2)[:, None] * rays["rays_d"][ray]
    dt = reference.step_at(full.t_starts, spec)
    hit = reference.is_occupied(bits, reference.cell_index(middle, dt, spec)).tolist()
    wanted = {sample for sample, is_hit in zip(every, hit, strict=True) if is_hit}
    got = set(zip(_ray_of(sparse), sparse.t_starts.tolist(), sparse.t_ends.tolist(), strict=True))
    assert got <= set(every)
    # Here without fused multiply-add, so float32 midpoints on a face may change sides: a handful.
    assert len(got ^ wanted) <= (1e-3 * len(wanted) if dtype == torch.float32 else 0)


def _ray_of(result: MarchResult) -> list[int]:
    counts = result.ray_offsets.diff()
    return torch.arange(len(counts)).repeat_interleave(counts).tolist()


def test_full_grid_equals_uniform_sampling(backend: str) -> None:
    spec = MarchSpec(8, 1, 0.25, 0.25)
    result = one_ray([0, 0.5, 0.5], [1, 0, 0], spec, make_bits(spec, 2.0))
    assert result.t_starts.tolist() == [0, 0.25, 0.5, 0.75] and result.t_ends.tolist() == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_full_grid_samples_are_contiguous_from_jittered_entry_to_exit(spec: MarchSpec, backend: str) -> None:
    rays = make_rays("contiguous", 50)
    result = march(**rays, bitfield=make_bits(spec, 2.0), spec=spec)
    entry, exit_, meets = reference.clip_rays(*(rays[k] for k in ("rays_o", "rays_d", "near", "far", "aabb")))
    for r in meets.nonzero()[:, 0].tolist():
        a, b = result.ray_offsets[r : r + 2].tolist()
        if a == b:
            continue
        starts, ends = result.t_starts[a:b], result.t_ends[a:b]
        dt = reference.step_at(entry[r], spec)
        assert torch.equal(starts[1:], ends[:-1])
        assert starts[0] == pytest.approx(float(entry[r] + rays["jitter"][r] * dt))
        assert ends[-1] <= exit_[r] and exit_[r] - ends[-1] <= 1e-3 * spec.step_max


def test_empty_grid_gives_no_samples(backend: str) -> None:
    rays = make_rays("empty", 20)
    result = march(**rays, bitfield=make_bits(SPECS["cone"], 0.0), spec=SPECS["cone"])
    assert result.ray_offsets.tolist() == [0] * 21 and len(result.t_starts) == len(result.t_ends) == 0


def test_one_occupied_cell_gives_exactly_the_samples_inside_it(backend: str) -> None:
    """Cell x = 2 of 8 is [0.25, 0.375): with steps of 1/16 its midpoints are those of the steps 4 and 5."""
    spec = MarchSpec(8, 1, 1 / 16, 1 / 16)
    occs = torch.zeros(8, 8, 8)
    occs[4, 3, 2] = 1  # z, y, x
    result = one_ray([0, 0.45, 0.55], [1, 0, 0], spec, pack_bits(occs.flatten(), 0.5))
    assert result.t_starts.tolist() == [0.25, 0.3125]
    backwards = one_ray([1, 0.45, 0.55], [-1, 0, 0], spec, pack_bits(occs.flatten(), 0.5))
    assert backwards.t_starts.tolist() == [0.625, 0.6875]


def test_the_smallest_cascade_that_holds_the_midpoint_decides(backend: str) -> None:
    """Two cascades of 4 cells: only the inner one, [0.25, 0.75), is occupied."""
    spec = MarchSpec(4, 2, 0.125, 0.125)
    occs = torch.cat([torch.ones(64), torch.zeros(64)])
    result = one_ray([0, 0.5, 0.5], [1, 0, 0], spec, pack_bits(occs, 0.5))
    assert result.t_starts.tolist() == [0.25, 0.375, 0.5, 0.625]


def test_steps_longer_than_a_cell_are_decided_by_the_coarser_cascade(backend: str) -> None:
    """The inner cells measure 1/8: a step of 1/8 still asks them, a step of 1/4 asks the outer cells."""
    occs = torch.cat([torch.ones(64), torch.zeros(64)])
    for step, expected in ((0.125, 4), (0.25, 0)):
        assert (
            len(one_ray([0, 0.5, 0.5], [1, 0, 0], MarchSpec(4, 2, step, step), pack_bits(occs, 0.5)).t_starts)
            == expected
        )


def test_cone_steps_grow_with_distance_between_their_bounds(backend: str) -> None:
    spec = MarchSpec(8, 1, 0.01, 0.2, cone_angle=0.5)
    result = one_ray([0, 0.5, 0.5], [1, 0, 0], spec, make_bits(spec, 2.0))
    lengths = result.t_ends - result.t_starts
    torch.testing.assert_close(lengths[:-1], (result.t_starts[:-1] * 0.5).clamp(0.01, 0.2))


def test_near_far_and_max_samples_limit_a_ray(backend: str) -> None:
    spec = MarchSpec(8, 1, 0.1, 0.1, max_samples=3)
    result = one_ray([0, 0.5, 0.5], [1, 0, 0], spec, make_bits(spec, 2.0), near=0.35, far=0.5)
    torch.testing.assert_close(result.t_starts, torch.tensor([0.35, 0.45], dtype=torch.float64))
    torch.testing.assert_close(result.t_ends, torch.tensor([0.45, 0.5], dtype=torch.float64))
    assert len(one_ray([0, 0.5, 0.5], [1, 0, 0], spec, make_bits(spec, 2.0)).t_starts) == 3


HOPELESS = {
    "miss": ([2, 2, 2], [1, 0, 0]),
    "behind": ([2, 0.5, 0.5], [1, 0, 0]),
    "parallel_outside": ([0.5, 2, 0.5], [1, 0, 0]),
    "nan_origin": ([math.nan, 0.5, 0.5], [1, 0, 0]),
    "nan_direction": ([0, 0.5, 0.5], [1, math.nan, 0]),
    "infinite_origin": ([-math.inf, 0.5, 0.5], [1, 0, 0]),
    "infinite_direction": ([0, 0.5, 0.5], [math.inf, 0, 0]),
    "far_away": ([1e30, -1e30, 1e30], [0.6, 0.8, 0]),
}


@pytest.mark.parametrize("ray", HOPELESS.values(), ids=HOPELESS.keys())
@pytest.mark.parametrize("spec", [SPECS["one_cascade"], SPECS["cone"]], ids=["constant", "cone"])
def test_rays_that_miss_or_are_not_finite_have_no_samples(
    ray: tuple[list[float], list[float]], spec: MarchSpec, backend: str
) -> None:
    assert one_ray(*ray, spec, make_bits(spec, 2.0)).ray_offsets.tolist() == [0, 0]


@pytest.mark.parametrize(
    "bad", [{"near": math.nan}, {"far": math.nan}, {"jitter": math.nan}, {"near": 2.0, "far": 1.0}]
)
def test_impossible_ranges_have_no_samples(bad: dict[str, float], backend: str) -> None:
    spec = SPECS["one_cascade"]
    assert len(one_ray([0, 0.5, 0.5], [1, 0, 0], spec, make_bits(spec, 2.0), **bad).t_starts) == 0


@pytest.mark.parametrize("origin", [[0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1], [0.5, 0.5, 1.0]])
def test_still_components_and_corners_are_safe(origin: list[float], backend: str) -> None:
    spec = MarchSpec(8, 1, 0.1, 0.1)
    result = one_ray(origin, [0, 0, -1], spec, make_bits(spec, 2.0))
    assert float((result.t_ends - result.t_starts).sum()) == pytest.approx(origin[2], abs=1e-3)


def test_a_ray_that_does_not_move_ends(backend: str) -> None:
    spec = MarchSpec(8, 1, 0.1, 0.1, max_samples=7)
    full, none = make_bits(spec, 2.0), make_bits(spec, 0.0)
    assert len(one_ray([0.5, 0.5, 0.5], [0, 0, 0], spec, full, far=math.inf).t_starts) == 7
    assert len(one_ray([0.5, 0.5, 0.5], [0, 0, 0], spec, none, far=10.0).t_starts) == 0
    assert len(one_ray([0.5, 0.5, 0.5], [0, 0, 0], spec, full, near=-math.inf).t_starts) == 0


def test_native_rays_without_an_end_are_given_up() -> None:
    cone = MarchSpec(8, 1, 0.1, 0.1, cone_angle=0.1)
    for direction in ([0, 0, 0], [1e-30, 0, 0]):
        assert len(one_ray([0.5, 0.5, 0.5], direction, cone, make_bits(cone, 0.0), far=math.inf).t_starts) == 0


def test_the_box_cuts_rays_and_is_cut_by_the_unit_cube(backend: str) -> None:
    spec = MarchSpec(8, 1, 0.1, 0.1)
    box = torch.tensor([[0.3, -5, -5], [7, 7, 7]], dtype=torch.float64)
    o, d = torch.tensor([[-1.0, 0.5, 0.5]], dtype=torch.float64), torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    result = march(o, d, zero, zero + torch.inf, box, make_bits(spec, 2.0), spec)
    assert float(result.t_starts[0]) == pytest.approx(1.3) and float(result.t_ends[-1]) == pytest.approx(2.0)


def test_zero_rays_and_one_ray(backend: str) -> None:
    spec = SPECS["cone"]
    for n in (0, 1):
        result = march(**make_rays("few", n), bitfield=make_bits(spec, 2.0), spec=spec)
        assert len(result.ray_offsets) == n + 1 and result.ray_offsets[-1] == len(result.t_starts)


def test_shuffling_rays_permutes_samples(backend: str) -> None:
    rays, spec = make_rays("shuffle", 70), SPECS["three_cascades"]
    order = torch.randperm(70, generator=step_generator(0, "order"))
    shuffled = {k: v if k == "aabb" else v[order] for k, v in rays.items()}
    first, second = (march(**r, bitfield=make_bits(spec, 0.3), spec=spec) for r in (rays, shuffled))
    assert torch.equal(first.ray_offsets.diff()[order], second.ray_offsets.diff())
    pieces = first.t_starts.split(first.ray_offsets.diff().tolist())
    assert torch.equal(torch.cat([pieces[i] for i in order]), second.t_starts)


def test_marching_repeats_bit_for_bit_and_accepts_strided_rays() -> None:
    rays, spec, bits = make_rays("repeat", 300), SPECS["cone"], make_bits(SPECS["cone"], 0.3)
    first = march(**rays, bitfield=bits, spec=spec)
    strided = {k: torch.stack([v, v], -1)[..., 0] for k, v in rays.items()}
    for other in (march(**rays, bitfield=bits, spec=spec), march(**strided, bitfield=bits, spec=spec)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_fill_writes_only_its_samples(dtype: torch.dtype) -> None:
    """Sentinels around the output buffers survive."""
    if _library.cpu_library() is None:
        pytest.skip("no native library")
    rays, spec = make_rays("canary", 50, dtype), SPECS["one_cascade"]
    bits = make_bits(spec, 0.4)
    want = march(**rays, bitfield=bits, spec=spec)
    buffers = torch.full((2, len(want.t_starts) + 16), -7.0, dtype=dtype)
    fixed = [rays[k] for k in ("rays_o", "rays_d", "near", "far", "jitter", "aabb")]
    sizes = (50, spec.resolution, spec.n_cascades, spec.step_min, spec.step_max, spec.cone_angle, spec.max_samples)
    suffix = "f32" if dtype == torch.float32 else "f64"
    cpu_face().run(
        f"pmf_march_fill_cpu_{suffix}",
        torch.empty(0),
        *fixed,
        bits,
        *sizes,
        want.ray_offsets,
        buffers[0, 8:],
        buffers[1, 8:],
    )
    assert torch.equal(buffers[0, 8:-8], want.t_starts) and torch.equal(buffers[1, 8:-8], want.t_ends)
    assert (buffers[:, :8] == -7).all() and (buffers[:, -8:] == -7).all()


def test_bits_are_little_endian_and_nan_is_empty(backend: str) -> None:
    occs = torch.tensor([0, 1, 0, 0, 0, 0, 0, 1, math.nan, 0.5, 0.6, 0, 0, 0, 0, math.inf])
    assert pack_bits(occs, 0.5).tolist() == [0b10000010, 0b10000100]
    assert pack_bits(occs.double()[::1], 0.5).dtype == torch.uint8


def test_cells_of_and_occupied_at_agree_with_the_documented_order() -> None:
    spec = MarchSpec(4, 2, 0.1, 0.1)
    points = torch.tensor([[0.3, 0.5, 0.7], [0.9, 0.1, 0.3], [1.2, 0.5, 0.5], [1.0, 1.0, 1.0]])
    inner, outer, corner = (0 * 4 + 3) * 16 + 2 * 4 + 0, (1 * 4 + 1) * 16 + 0 * 4 + 3, 127
    assert cells_of(points, spec).tolist() == [inner, outer, -1, corner]
    occs = torch.zeros(128)
    occs[[inner, corner]] = 1
    assert occupied_at(points, pack_bits(occs, 0.5), spec).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rays_d": torch.zeros(5, 4, dtype=torch.float64)}, "rays_d must have shape"),
        ({"near": torch.zeros(4, dtype=torch.float64)}, "near must have shape"),
        ({"far": torch.zeros(5)}, "far must be torch.float64"),
        ({"rays_o": torch.zeros(5, 3, dtype=torch.float16)}, "rays_o must be torch.float32 or torch.float64"),
        ({"bitfield": torch.zeros(3, dtype=torch.uint8)}, "bitfield must have shape"),
        ({"jitter": torch.zeros(6, dtype=torch.float64)}, "jitter must have shape"),
        ({"aabb": torch.zeros(6, dtype=torch.float64)}, "aabb must have shape"),
        ({"near": torch.zeros(5, dtype=torch.float64, device="meta")}, "on one device"),
        ({"rays_o": torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)}, "no gradient"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    spec = SPECS["one_cascade"]
    inputs = {**make_rays("wrong", 5), "bitfield": make_bits(spec, 0.5), **change}
    with pytest.raises(ShapeError, match=message):
        march(**inputs, spec=spec)
    with pytest.raises(ShapeError, match="multiple of 8"):
        pack_bits(torch.zeros(9), 0.5)


@pytest.mark.parametrize(
    "bad",
    [{"resolution": 5}, {"resolution": 6, "n_cascades": 2}, {"step_min": 0.0}, {"step_min": 1.0}, {"max_samples": 0}],
)
def test_impossible_specs_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="march: "):
        MarchSpec(**bad)  # type: ignore[arg-type]


def test_registration_passes_opcheck(backend: str) -> None:
    spec, rays = SPECS["one_cascade"], make_rays("opcheck", 6)
    arguments = (*(rays[k] for k in ("rays_o", "rays_d", "near", "far", "aabb")), make_bits(spec, 0.3), rays["jitter"])
    torch.library.opcheck(torch.ops.posemap_fast.march.default, (*arguments, 32, 1, 0.01, 0.01, 0.0, 64))
    torch.library.opcheck(torch.ops.posemap_fast.pack_bits.default, (torch.rand(64), 0.5))
