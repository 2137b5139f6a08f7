"""The fused renderer under the host emulation, against an oracle that rounds where the kernel rounds."""

from __future__ import annotations

import ctypes
import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from posemap_fast.fields.hash_field import MAX_LOG_DENSITY
from posemap_fast.ops.hash_encode import HashGridSpec
from posemap_fast.ops.march import MarchSpec
from posemap_fast.ops.reference.composite import composite, ray_indices
from posemap_fast.ops.reference.fused_mlp import split_params
from posemap_fast.ops.reference.hash_encode import hash_encode
from posemap_fast.ops.reference.march import march
from posemap_fast.ops.reference.sh_encode import sh_encode
from posemap_fast.seeding import step_generator

HEADER = Path(__file__).resolve().parents[2] / "cuda_ext" / "fused_render" / "fused_render.h"
CANARY = -7.25
BAD_ARGUMENT = 1
TOLERANCE = 3e-3  # a hidden number may round to its neighbour in half, 5e-4 away, and pass through an exponential


def header_fields() -> list[tuple[str, Any]]:
    """The fields of the structure as the C header declares them."""
    body = HEADER.read_text().split("struct PmfFusedRender {")[1].split("};")[0]
    fields: list[tuple[str, Any]] = []
    for line in re.sub(r"//.*", "", body).split(";"):
        match = re.fullmatch(r"\s*(?:const )?(\w+)(\*?) ([\w, ]+)\s*", line)
        if match is None:
            continue
        kind = ctypes.c_void_p if match[2] else {"int64_t": ctypes.c_int64, "double": ctypes.c_double}[match[1]]
        fields += [(name.strip(), kind) for name in match[3].split(",")]
    return fields


class Parameters(ctypes.Structure):
    _fields_ = header_fields()


GRID = HashGridSpec(8, 2, 10, 4, 32)
STEPS = MarchSpec(resolution=16, step_min=0.04, step_max=0.04)


@dataclass(frozen=True)
class Setup:
    """Sizes of a case."""

    n_rays: int = 40
    grid: HashGridSpec = GRID
    spec: MarchSpec = STEPS
    hidden: int = 32
    n_geo: int = 16
    sh_degree: int = 3
    appearance_dim: int = 5
    pose_hidden: int = 32  # 0: no pose branch
    is_table_half: bool = True
    has_appearance: bool = True
    jittered: bool = False
    density: float = 2.0
    eps: float = 1e-4
    occupied: float = 0.5


@dataclass
class Scene:
    """Tensors of a case; weights are half."""

    setup: Setup
    origins: torch.Tensor
    directions: torch.Tensor
    near: torch.Tensor
    far: torch.Tensor
    jitter: torch.Tensor | None
    aabb: torch.Tensor
    bits: torch.Tensor
    table: torch.Tensor
    density: torch.Tensor
    colour: torch.Tensor
    pose: torch.Tensor | None
    appearance: torch.Tensor | None

    @property
    def density_dims(self) -> tuple[int, ...]:
        return self.setup.grid.output_dim, self.setup.hidden, self.setup.n_geo

    @property
    def colour_dims(self) -> tuple[int, ...]:
        s = self.setup
        return s.n_geo + s.sh_degree**2 + s.appearance_dim, s.hidden, s.hidden, 3

    @property
    def pose_dims(self) -> tuple[int, ...]:
        s = self.setup
        return s.grid.output_dim + s.n_geo, s.pose_hidden, s.pose_hidden


def make_scene(setup: Setup) -> Scene:
    g = step_generator(setup.n_rays, "fused_render_cuda")
    n = setup.n_rays

    def weights(dims: tuple[int, ...]) -> torch.Tensor:
        parts = [torch.randn(o * i, generator=g) * math.sqrt(2 / i) for i, o in itertools.pairwise(dims)]
        return torch.cat(parts).half()

    origins = torch.rand(n, 3, generator=g) * 1.4 - 0.2
    target = 0.3 + 0.4 * torch.rand(n, 3, generator=g)
    directions = torch.nn.functional.normalize(target - origins, dim=1)
    n_bytes = setup.spec.n_cells // 8
    chosen = torch.rand(n_bytes, 8, generator=g) < setup.occupied
    table = torch.rand(setup.grid.n_entries, setup.grid.n_features_per_level, generator=g) * 2 - 1
    scene = Scene(
        setup=setup,
        origins=origins,
        directions=directions,
        near=torch.full((n,), 0.02),
        far=torch.full((n,), 1e4),
        jitter=torch.rand(n, generator=g) if setup.jittered else None,
        aabb=torch.tensor([[0.05, 0.0, 0.0], [1.0, 0.9, 1.0]], dtype=torch.float64),
        bits=(chosen * 2 ** torch.arange(8)).sum(1).to(torch.uint8),
        table=table.half() if setup.is_table_half else table,
        density=torch.empty(0),
        colour=torch.empty(0),
        pose=None,
        appearance=torch.randn(n, setup.appearance_dim, generator=g) if setup.has_appearance else None,
    )
    scene.density, scene.colour = weights(scene.density_dims), weights(scene.colour_dims)
    if setup.pose_hidden:
        scene.pose = weights(scene.pose_dims)
    return scene


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def guarded(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.full((math.prod(shape) + 128,), CANARY).to(dtype)
    return whole, whole[64:-64].view(shape).fill_(-1)


def run(emulated: Any, scene: Scene, expected: int = 0) -> dict[str, torch.Tensor]:
    setup, n = scene.setup, scene.setup.n_rays
    scales, resolutions, offsets, n_levels, n_features = setup.grid.native_arguments
    shapes: dict[str, tuple[int, ...]] = {"rgb": (n, 3), "depth": (n,), "opacity": (n,)}
    pairs = {name: guarded(shape) for name, shape in shapes.items()}
    pairs["n_samples"] = guarded((n,), torch.int64)
    if scene.pose is not None:
        pairs["pose"] = guarded((n, setup.pose_hidden))
    tensors = {
        **{name: getattr(scene, name) for name in ("origins", "directions", "near", "far", "jitter", "aabb", "bits")},
        "table": scene.table,
        "scales": scales,
        "resolutions": resolutions,
        "offsets": offsets,
        "density_weights": scene.density,
        "colour_weights": scene.colour,
        "pose_weights": scene.pose,
        "appearance": scene.appearance,
        **{name: middle for name, (_, middle) in pairs.items()},
    }
    spec = setup.spec
    numbers = {
        "n_rays": n,
        "resolution": spec.resolution,
        "n_cascades": spec.n_cascades,
        "step_min": spec.step_min,
        "step_max": spec.step_max,
        "cone_angle": spec.cone_angle,
        "max_samples": spec.max_samples,
        "is_table_half": int(setup.is_table_half),
        "n_levels": n_levels,
        "n_features": n_features,
        "hidden": setup.hidden,
        "n_geo": setup.n_geo,
        "sh_degree": setup.sh_degree,
        "appearance_dim": setup.appearance_dim,
        "pose_hidden": setup.pose_hidden,
        "early_stop_eps": setup.eps,
        "log_init_density": math.log(setup.density),
        "max_log_density": MAX_LOG_DENSITY,
    }
    parameters = Parameters(**{name: pointer(t) for name, t in tensors.items()}, **numbers)
    if expected:
        assert emulated.status("pmf_fused_render_cuda_f32", ctypes.byref(parameters)) == expected
        return {}
    emulated.call("pmf_fused_render_cuda_f32", ctypes.byref(parameters))
    for name, (whole, _) in pairs.items():
        canary = torch.tensor(CANARY).to(whole.dtype)
        assert bool((whole[:64] == canary).all() and (whole[-64:] == canary).all()), name
    return {name: middle for name, (_, middle) in pairs.items()}


def half(value: torch.Tensor) -> torch.Tensor:
    return value.float().half().double()


def mlp(x: torch.Tensor, params: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Hidden activations rounded to half, sums exact."""
    *hidden, last = split_params(params.double(), dims)
    x = half(x)
    for weight in hidden:
        x = half(torch.relu(x @ weight.t()))
    return x @ last.t()


def oracle(scene: Scene) -> dict[str, torch.Tensor]:
    setup = scene.setup
    aabb = scene.aabb.float()
    rays = (scene.origins, scene.directions, scene.near, scene.far)
    offsets, starts, ends = march(*rays, aabb, scene.bits, scene.jitter, setup.spec)
    index = ray_indices(offsets)
    middle = 0.5 * (starts + ends)
    x = scene.origins[index] + middle[:, None] * scene.directions[index]
    encoding = half(hash_encode(x.double(), scene.table.double(), setup.grid))
    geo = mlp(encoding, scene.density, scene.density_dims)
    sigmas = torch.exp((geo[:, 0] + math.log(setup.density)).clamp(max=MAX_LOG_DENSITY))
    appearance = scene.origins.new_zeros(setup.n_rays, setup.appearance_dim)
    if scene.appearance is not None:
        appearance = scene.appearance
    view = torch.cat([sh_encode(scene.directions.double(), setup.sh_degree), appearance.double()], dim=1)
    rgbs = torch.sigmoid(mlp(torch.cat([geo, view[index]], dim=1), scene.colour, scene.colour_dims))
    features = geo[:, :0]
    if scene.pose is not None:
        first, last = split_params(scene.pose.double(), scene.pose_dims)
        features = torch.relu(torch.cat([encoding, half(geo)], dim=1) @ first.t())
    rgb, depth, opacity, pose, weights = composite(
        sigmas, starts.double(), ends.double(), rgbs, features, offsets, setup.eps
    )
    kept = torch.zeros(setup.n_rays, dtype=torch.int64).index_add_(0, index, (weights > 0).long())
    found = {"rgb": rgb, "depth": depth, "opacity": opacity, "n_samples": kept}
    return {**found, "pose": half(pose) @ last.t()} if scene.pose is not None else found


def expect_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name in ("rgb", "depth", "opacity", "pose"):
        if name not in want:
            continue
        scale = max(float(want[name].abs().max()), 1.0) if want[name].numel() else 1.0
        torch.testing.assert_close(got[name].double() / scale, want[name] / scale, rtol=0, atol=TOLERANCE)
    # A transmittance next to the threshold may fall to either side.
    assert int((got["n_samples"] != want["n_samples"]).sum()) <= len(want["n_samples"]) // 20


CASES = {
    "half_table": Setup(),
    "float_table": Setup(is_table_half=False, grid=HashGridSpec(8, 4, 8, 4, 24), sh_degree=4, appearance_dim=16),
    "one_feature": Setup(grid=HashGridSpec(5, 1, 8, 4, 24), n_geo=8, hidden=16, pose_hidden=48, sh_degree=1),
    "full_size": Setup(20, HashGridSpec(16, 2, 10, 4, 64), hidden=64, pose_hidden=64, sh_degree=4, appearance_dim=16),
    "no_pose": Setup(pose_hidden=0, appearance_dim=0, has_appearance=False),
    "no_code": Setup(has_appearance=False, grid=HashGridSpec(8, 4, 8, 4, 24)),
    "opaque": Setup(density=20.0, eps=1e-2),
    "no_early_stop": Setup(eps=0.0, density=1.0),
    "cone": Setup(spec=MarchSpec(16, 2, 0.02, 0.1, 0.05), jittered=True),
    "few_samples": Setup(spec=MarchSpec(16, 1, 0.04, 0.04, 0.0, max_samples=3)),
    "sparse": Setup(60, occupied=0.01),
    "empty": Setup(33, occupied=0.0),
    "one_ray": Setup(1),
    "two_rays": Setup(2, jittered=True),
    "seventeen": Setup(17),
    "no_rays": Setup(0),
}


@pytest.mark.parametrize("setup", CASES.values(), ids=CASES.keys())
def test_rays_are_those_of_the_rounded_field(emulated: Any, schedule: Any, setup: Setup) -> None:
    scene = make_scene(setup)
    want = oracle(scene)
    if setup.n_rays > 10 and setup.occupied > 0.1:
        assert int(want["n_samples"].sum()) > setup.n_rays  # the case shows something
    expect_close(run(emulated, scene), want)


def test_many_rays_go_round_the_warps(emulated: Any) -> None:
    """The emulated device holds fewer warps than these rays would fill."""
    scene = make_scene(Setup(700, spec=MarchSpec(16, 1, 0.1, 0.1), grid=HashGridSpec(2, 2, 8, 4, 8), hidden=16))
    expect_close(run(emulated, scene), oracle(scene))


def test_a_ray_does_not_depend_on_its_neighbours(emulated: Any, schedule: Any) -> None:
    scene = make_scene(Setup(37))
    together = run(emulated, scene)
    for r in (0, 5, 36):
        alone = replace(scene, setup=replace(scene.setup, n_rays=1))
        for name in ("origins", "directions", "near", "far", "appearance"):
            setattr(alone, name, getattr(scene, name)[r : r + 1].clone())
        for name, values in run(emulated, alone).items():
            assert torch.equal(values[0], together[name][r]), name


def test_nan_stays_on_its_ray(emulated: Any, schedule: Any) -> None:
    scene = make_scene(Setup(20))
    clean = run(emulated, scene)
    assert scene.appearance is not None
    scene.appearance[3] = torch.nan
    scene.origins[7, 1] = torch.nan
    spoiled = run(emulated, scene)
    others = (torch.arange(20) != 3) & (torch.arange(20) != 7)
    for name in clean:
        assert torch.equal(spoiled[name][others], clean[name][others]), name
        assert not bool(spoiled[name][7].any()), name  # a ray that is not made of numbers meets nothing
    assert int(clean["n_samples"][3]) > 0 and bool(spoiled["rgb"][3].isnan().all())


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 24},
        {"hidden": 80},
        {"pose_hidden": 8},
        {"n_geo": 17},
        {"appearance_dim": 24},
        {"grid": HashGridSpec(9, 4, 8, 4, 24)},
        {"grid": HashGridSpec(4, 8, 8, 4, 24)},
    ],
    ids=str,
)
def test_unsupported_sizes_are_refused(emulated: Any, change: dict[str, Any]) -> None:
    run(emulated, make_scene(replace(Setup(4), **change)), expected=BAD_ARGUMENT)
