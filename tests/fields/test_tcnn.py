"""The tiny-cuda-nn backbone: its layouts against the documented ones, and the adapter on a small stand-in.

`FakeTinyCudaNN` is written from tiny-cuda-nn's sources (named beside each part), not from the adapter: it takes the
config dictionaries and the flat parameters, computes in half precision and asserts what the real one demands. The
tests marked `cuda` run the real one against the reference.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from posemap_fast.errors import BackendError, ShapeError
from posemap_fast.fields import FIELD_BACKBONES, FieldConfig, HashField
from posemap_fast.fields.tcnn import TcnnFunctions, build_on, gradient_scale
from posemap_fast.fields.tcnn_layout import (
    encoding_config,
)
from posemap_fast.ops import HashGridSpec, MLPSpec
from posemap_fast.ops.reference.fused_mlp import fused_mlp
from posemap_fast.ops.reference.hash_encode import hash_encode
from posemap_fast.optional import TINYCUDANN

CONFIG = FieldConfig(
    pose_branch="features",
    backbone="tcnn",
    n_levels=4,
    log2_hashmap_size=10,
    base_resolution=4,
    finest_resolution=32,
    hidden=16,
    geo_features=9,
    appearance_dim=3,
    pose_hidden=8,
)
HALF_EPS = 2.0**-11
LOSS_SCALE = 128.0  # common.h: default_loss_scale<__half>


class _Native(torch.autograd.Function):
    """`_module_function` of modules.py: half parameters and outputs, gradients scaled in half."""

    @staticmethod
    def forward(ctx: Any, module: FakeModule, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        assert len(x) > 0 and len(x) % 256 == 0, "BATCH_SIZE_GRANULARITY (common.h)"
        assert x.dtype == torch.float32 and params.dtype == torch.half
        assert x.shape[1] == module.n_input_dims and params.shape == (module.n_params,)
        with torch.enable_grad():
            ctx.x, ctx.params = x.detach().requires_grad_(True), params.detach().float().requires_grad_(True)
            ctx.out = module.compute(ctx.x, ctx.params)
        return ctx.out.detach().half()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        assert grad.dtype == torch.half
        scaled = grad * LOSS_SCALE
        grad_x, grad_params = torch.autograd.grad(
            ctx.out, (ctx.x, ctx.params), scaled.float(), retain_graph=True, allow_unused=True
        )
        half = grad_params.half()
        assert bool(scaled.isfinite().all()) and bool(half.isfinite().all()), "a half has overflowed"
        return None, grad_x / LOSS_SCALE, half / LOSS_SCALE


class FakeModule(nn.Module):
    """`Module` of modules.py."""

    def __init__(self, n_input_dims: int, n_output_dims: int, n_params: int):
        super().__init__()
        self.n_input_dims, self.n_output_dims, self.n_params = n_input_dims, n_output_dims, n_params
        self.params = nn.Parameter(torch.zeros(n_params))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(x, [0, 0, 0, -len(x) % 256])
        out = _Native.apply(self, padded.to(torch.float).contiguous(), self.params.to(torch.half).contiguous())
        return out[: len(x), : self.n_output_dims]


class FakeEncoding(FakeModule):
    """Grid encoding, from encodings/grid.h (sizes) and common_device.h (grid_scale, grid_index)."""

    def __init__(self, n_input_dims: int, config: dict[str, Any]):
        assert n_input_dims == 3 and config["otype"] == "HashGrid" and config["interpolation"] == "Linear"
        self.width = config["n_features_per_level"]
        log2_scale = torch.tensor(config["per_level_scale"], dtype=torch.float32).log2()
        levels = torch.arange(config["n_levels"], dtype=torch.float32)
        self.scales = torch.exp2(levels * log2_scale) * config["base_resolution"] - 1.0
        self.sizes = [math.ceil(float(scale)) + 1 for scale in self.scales]
        rows = [min(-(-(size**3) // 8) * 8, 2 ** config["log2_hashmap_size"]) for size in self.sizes]
        self.offsets = [sum(rows[:i]) for i in range(len(rows) + 1)]
        super().__init__(3, config["n_levels"] * self.width, self.offsets[-1] * self.width)

    def compute(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._level(x, params, i) for i in range(len(self.sizes))], dim=1)

    def _level(self, x: torch.Tensor, params: torch.Tensor, level: int) -> torch.Tensor:
        table = params.view(-1, self.width)[self.offsets[level] : self.offsets[level + 1]]
        position = x * self.scales[level] + 0.5
        cell = position.detach().floor()
        out = torch.zeros(len(x), self.width)
        for corner in range(8):
            bits = torch.tensor([corner >> d & 1 for d in range(3)])
            weight = torch.where(bits == 1, position - cell, 1 - (position - cell)).prod(1)
            out = out + weight[:, None] * table[self._rows(cell.long() + bits, level, len(table))]
        return out

    def _rows(self, corner: torch.Tensor, level: int, n_rows: int) -> torch.Tensor:
        size = self.sizes[level]
        if n_rows < size**3:
            primes = torch.tensor([1, 2654435761, 805459861])
            x, y, z = ((corner * primes) & 0xFFFFFFFF).unbind(1)
            return (x ^ y ^ z) % n_rows
        return (corner * torch.tensor([1, size, size**2])).sum(1) % n_rows


class FakeNetwork(FakeModule):
    """FullyFusedMLP and CutlassMLP behind Identity (network_with_input_encoding.h, fully_fused_mlp.cu)."""

    def __init__(self, n_input_dims: int, n_output_dims: int, config: dict[str, Any]):
        width = config["n_neurons"]
        assert (config["activation"], config["output_activation"]) == ("ReLU", "None")
        assert config["n_hidden_layers"] >= 1
        assert config["otype"] == "CutlassMLP" or width in (16, 32, 64, 128)
        assert width % 8 == 0, "128-bit loads of half"
        ins = [-(-n_input_dims // 16) * 16] + [width] * config["n_hidden_layers"]
        outs = [width] * config["n_hidden_layers"] + [-(-n_output_dims // 16) * 16]
        self.shapes = list(zip(outs, ins, strict=True))
        super().__init__(n_input_dims, n_output_dims, sum(o * i for o, i in self.shapes))

    def compute(self, x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
        x = F.pad(x, (0, self.shapes[0][1] - x.shape[1]), value=1.0).half().float()  # identity.h pads with ones
        weights = params.split([o * i for o, i in self.shapes])
        for k, (weight, (n_out, n_in)) in enumerate(zip(weights, self.shapes, strict=True)):
            x = x @ weight.view(n_out, n_in).T
            x = x if k + 1 == len(self.shapes) else F.relu(x)
        return x


FakeTinyCudaNN = SimpleNamespace(Encoding=FakeEncoding, Network=FakeNetwork)


def random_table(field: HashField) -> HashField:
    with torch.no_grad():
        field.table.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return field


def field_pair(config: FieldConfig = CONFIG) -> tuple[HashField, HashField]:
    """The adapter on the stand-in, and the reference with the same parameters."""
    reference = random_table(FIELD_BACKBONES.get("reference")(dataclasses.replace(config, backbone="reference")))
    field = build_on(FakeTinyCudaNN, config)
    field.load_state_dict(reference.state_dict())
    return field, reference


def inputs(n: int = 300, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, 3, generator=generator)
    rays_d = F.normalize(torch.randn(5, 3, generator=generator), dim=1)
    appearance = torch.randn(5, 3, generator=generator)
    return x.to(device), rays_d.to(device), appearance.to(device), (torch.arange(n) * 5 // n).to(device)


def outputs(field: HashField, x: torch.Tensor, *view: torch.Tensor) -> list[torch.Tensor]:
    sigma, features = field.density(x)
    rgb = field.rgb(features, view[0], view[1], view[2])
    return [sigma.log(), features.encoding, features.geo, rgb, field.pose_hidden(x, features)]


def rounded(values: torch.Tensor) -> torch.Tensor:
    """Rounded to half, with the gradient of the identity: what the networks compute with."""
    return values + (values.half().float() - values).detach()


@torch.no_grad()
def assert_close_in_half(a: torch.Tensor, b: torch.Tensor, roundings: float = 8.0) -> None:
    """Error of at most some roundings of a half at the size of the tensor's values."""
    assert float((a - b).abs().max()) <= roundings * HALF_EPS * float(b.abs().max())


@torch.no_grad()
def assert_same_gradient(a: torch.Tensor, b: torch.Tensor, share: float = 0.02) -> None:
    """Relative error of the whole: single rows differ by all they have where rounding flips a ReLU or a cell."""
    assert bool(a.isfinite().all()) and float((a - b).norm()) <= share * float(b.norm())


GRIDS = [
    HashGridSpec(16, 2, 19, 16, 2048),
    HashGridSpec(16, 2, 17, 16, 1328),
    HashGridSpec(5, 4, 19, 16, 64),  # growth sqrt(2): two levels have whole-number scales
    HashGridSpec(7, 1, 17, 16, 128),
    HashGridSpec(4, 8, 10, 4, 32),
    HashGridSpec(1, 2, 14, 16, 16),
]
NETWORKS = [MLPSpec((32, 64, 16)), MLPSpec((47, 64, 64, 3)), MLPSpec((20, 8, 8)), MLPSpec((5, 100, 100, 100, 17))]


# ---- the two functions


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_table_has_the_levels_and_the_size_that_tiny_cuda_nn_computes(spec: HashGridSpec) -> None:
    theirs = FakeEncoding(3, encoding_config(spec))
    assert tuple(theirs.offsets) == spec.level_offsets
    dense = [level for level, size in enumerate(spec.resolutions) if size**3 <= 2**spec.log2_hashmap_size]
    assert [theirs.sizes[level] for level in dense] == [spec.resolutions[level] for level in dense]
    ours = torch.tensor(spec.scales)
    assert float(((theirs.scales - ours) / (ours + 1)).abs().max()) < 1e-5


@pytest.mark.parametrize("spec", NETWORKS, ids=str)
@pytest.mark.parametrize("n", [1, 255, 256, 300])
def test_network_agrees_with_the_reference_in_value_and_gradients(spec: MLPSpec, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    params = (torch.rand(spec.n_params, generator=generator) - 0.5).requires_grad_(True)
    x = torch.rand(n, spec.dims[0] - 2, generator=generator).requires_grad_(True)
    extra = torch.rand(3, 2, generator=generator).requires_grad_(True)
    index = torch.arange(n) * 3 // n
    cotangent = torch.randn(n, spec.dims[-1], generator=generator)
    found = TcnnFunctions(FakeTinyCudaNN).fused_mlp(x, params, spec, extra, index)
    expected = fused_mlp(rounded(x), rounded(params), spec.dims, rounded(extra), index)
    assert found.dtype == torch.float32
    assert_close_in_half(found, expected)
    both = [torch.autograd.grad((out * cotangent).sum(), (x, params, extra)) for out in (found, expected)]
    for ours, wanted in zip(*both, strict=True):
        assert_same_gradient(ours, wanted, share=0.002)


@pytest.mark.parametrize("spec", GRIDS[2:], ids=str)
def test_grid_agrees_with_the_reference_in_value_and_gradients(spec: HashGridSpec) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(spec.n_entries, spec.n_features_per_level, generator=generator).requires_grad_(True)
    x = torch.rand(300, 3, generator=generator).requires_grad_(True)
    cotangent = torch.randn(300, spec.output_dim, generator=generator)
    found = TcnnFunctions(FakeTinyCudaNN).hash_encode(x, table, spec)
    expected = hash_encode(x, table, spec)
    assert_close_in_half(found, expected)
    both = [torch.autograd.grad((out * cotangent).sum(), (x, table)) for out in (found, expected)]
    for ours, wanted in zip(*both, strict=True):
        assert_same_gradient(ours, wanted)


def test_points_outside_and_nan_count_as_in_the_other_backbones() -> None:
    spec = GRIDS[4]
    table = torch.rand(spec.n_entries, 8)
    x = torch.tensor([[1.5, 0.5, 0.5], [-0.2, 0.5, 0.5], [float("nan"), 0.5, 0.5]], requires_grad=True)
    out = TcnnFunctions(FakeTinyCudaNN).hash_encode(x, table, spec)
    assert_close_in_half(out, hash_encode(x, table, spec))
    out.sum().backward()
    assert torch.equal(x.grad[:, 0], torch.zeros(3)) and bool((x.grad[:, 1] != 0).all())


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1.0, 1e6])
def test_gradients_of_any_size_survive_half_precision(size: float) -> None:
    spec = MLPSpec((32, 64, 16))
    params = (torch.rand(spec.n_params) - 0.5).requires_grad_(True)
    x = torch.rand(1000, 32, requires_grad=True)
    cotangent = torch.randn(1000, 16) * size
    both = [
        torch.autograd.grad((out * cotangent).sum(), (x, params))
        for out in (
            TcnnFunctions(FakeTinyCudaNN).fused_mlp(x, params, spec),
            fused_mlp(rounded(x), rounded(params), spec.dims),
        )
    ]
    for ours, wanted in zip(*both, strict=True):
        assert_same_gradient(ours / size, wanted / size, share=0.002)


def test_gradient_scale_is_a_power_of_two_and_one_for_what_cannot_be_scaled() -> None:
    assert float(gradient_scale(torch.full((10, 2), 0.3))) == 4.0  # 10 * 0.3 * 4 = 12 <= 16
    assert float(gradient_scale(torch.tensor([[float("nan")]]))) == 1.0
    assert float(gradient_scale(torch.tensor([[float("inf")]]))) == 1.0
    assert math.isfinite(float(gradient_scale(torch.zeros(4, 2))))


def test_no_rows_do_not_reach_tiny_cuda_nn_and_keep_the_graph() -> None:
    field, _ = field_pair()
    _, rays_d, appearance, _ = inputs()
    x = torch.zeros(0, 3, requires_grad=True)
    found = outputs(field, x, rays_d, appearance, torch.zeros(0, dtype=torch.int64))
    assert [tuple(t.shape) for t in found] == [(0,), (0, 8), (0, 10), (0, 3), (0, 8)]
    sum(t.sum() for t in found).backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0 for p in field.parameters())


# ---- the field


@pytest.mark.parametrize("change", [{}, {"hidden": 48}, {"pose_hidden": 64, "geo_features": 15}, {"appearance_dim": 0}])
def test_field_agrees_with_the_reference(change: dict[str, int]) -> None:
    field, reference = field_pair(dataclasses.replace(CONFIG, **change))
    x, rays_d, appearance, rays = inputs()
    view = (rays_d, None if change.get("appearance_dim") == 0 else appearance, rays)
    for found, expected in zip(outputs(field, x, *view), outputs(reference, x, *view), strict=True):
        assert_close_in_half(found, expected, roundings=16.0)


def test_gradients_to_positions_directions_and_every_parameter_agree_with_the_reference() -> None:
    gradients = []
    for field in field_pair():
        x, rays_d, appearance, rays = (t.requires_grad_(t.is_floating_point()) for t in inputs())
        generator = torch.Generator().manual_seed(4)
        found = outputs(field, x, rays_d, appearance, rays)
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in found).backward()
        gradients.append([x.grad, rays_d.grad, appearance.grad, *(p.grad for p in field.parameters())])
    for ours, wanted in zip(*gradients, strict=True):
        assert_same_gradient(ours, wanted)


def test_state_is_that_of_the_other_backbones_and_nothing_more() -> None:
    field, reference = field_pair()
    ours, theirs = field.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs) == ["table", "density_params", "colour_params", "pose_params"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(list(field.parameters())) == 4


def test_a_frozen_field_still_moves_points() -> None:
    field, reference = field_pair()
    grads = []
    for one in (field, reference):
        one.requires_grad_(False)
        x = inputs()[0].requires_grad_(True)
        one.density(x)[1].geo.sum().backward()
        grads.append(x.grad)
    assert_same_gradient(*grads)


def test_a_copy_is_independent() -> None:
    field, _ = field_pair()
    other = copy.deepcopy(field)
    x = inputs()[0]
    before = field.density(x)[0]
    with torch.no_grad():
        other.table.zero_()
    assert torch.equal(field.density(x)[0], before) and not torch.equal(other.density(x)[0], before)


def test_double_precision_is_refused() -> None:
    field, _ = field_pair()
    with pytest.raises(ShapeError, match="float32"):
        field.double().density(torch.zeros(2, 3, dtype=torch.float64))


def test_tensors_on_another_device_are_refused() -> None:
    field, _ = field_pair()
    with pytest.raises(BackendError, match="move field and rays there"):
        field.density(torch.zeros(2, 3, device="meta"))


def test_another_number_of_parameters_is_refused() -> None:
    class Strange(FakeNetwork):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments)
            self.params = nn.Parameter(torch.zeros(7))

    with pytest.raises(BackendError, match="keeps 7 parameters"):
        build_on(SimpleNamespace(Encoding=FakeEncoding, Network=Strange), CONFIG)


def test_what_tiny_cuda_nn_refuses_is_said_when_the_field_is_built() -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("not compiled with neural network support")

    with pytest.raises(BackendError, match="neural network support"):
        build_on(SimpleNamespace(Encoding=FakeEncoding, Network=refuse), CONFIG)


# ---- the real library


@pytest.fixture
def tinycudann() -> Any:
    try:
        return TINYCUDANN.load()
    except BackendError as error:
        pytest.skip(str(error))


@pytest.mark.cuda
def test_real_library_agrees_with_the_reference_in_values_and_gradients(tinycudann: Any) -> None:
    config = FieldConfig(backbone="tcnn", finest_resolution=1328, log2_hashmap_size=17, appearance_dim=3)
    reference = random_table(FIELD_BACKBONES.get("reference")(config)).cuda()
    field = build_on(tinycudann, config).cuda()
    field.load_state_dict(reference.state_dict())
    results = []
    for one in (field, reference):
        x, rays_d, appearance, rays = inputs(5000, "cuda")
        x.requires_grad_(True)
        found = outputs(one, x, rays_d, appearance, rays)
        sum(t.mean() for t in found).backward()
        results.append([*found, x.grad, *(p.grad for p in one.parameters())])
    for ours, wanted in zip(*results, strict=True):
        assert float((ours - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.cuda
@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_real_grid_has_our_levels(tinycudann: Any, spec: HashGridSpec) -> None:
    generator = torch.Generator().manual_seed(3)
    table = torch.rand(spec.n_entries, spec.n_features_per_level, generator=generator).cuda()
    x = torch.rand(300, 3, generator=generator).cuda()
    found = TcnnFunctions(tinycudann).hash_encode(x, table, spec)
    # the finest level is moved by up to a hundredth of a cell
    assert float((found - hash_encode(x, table, spec)).abs().max()) < 0.03
