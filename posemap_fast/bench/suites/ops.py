"""Every op, forward and forward with backward, at three sizes, against plain and tuned PyTorch.

`plain torch` is the op's form in `ops.reference`: readable PyTorch, and what runs where no compiler is found. `tuned
torch` is the fastest PyTorch form that we could write; a ratio against it says what the kernel itself is worth.

Tolerances are relative 2-norms. Against a float64 reference 2e-5 allows float32 sums of the sizes used here; the hash
encoding is judged by the float32 reference, since at resolution 2048 the position itself is rounded to 1e-4 cell.
Where kernels compute in half precision (CUDA's MLPs), 2e-2 is what half has. In a whole training step the encoding's
rounding of up to 2e-5 puts one ReLU input in 10^5 on the other side of its kink; such a gradient is all wrong, so the
2-norm of them all is wrong by sqrt(1e-5) = 3e-3 at any size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F

from posemap_fast import ops
from posemap_fast.bench.case import FAMILIES, REPEATED, BenchContext, Comparison
from posemap_fast.bench.verify import Tensors, worst_error
from posemap_fast.ops import HashGridSpec, MarchSpec, MLPSpec, RadianceSpec
from posemap_fast.ops.reference.compact import compact as plain_compact
from posemap_fast.ops.reference.composite import composite as plain_composite
from posemap_fast.ops.reference.composite import composite_packed
from posemap_fast.ops.reference.fused_mlp import fused_mlp as plain_mlp
from posemap_fast.ops.reference.fused_radiance import fused_radiance as plain_radiance
from posemap_fast.ops.reference.hash_encode import corner_rows
from posemap_fast.ops.reference.hash_encode import hash_encode as plain_hash_encode
from posemap_fast.ops.reference.march import march as plain_march
from posemap_fast.ops.reference.sh_encode import sh_encode as plain_sh_encode
from posemap_fast.seeding import step_generator

__all__ = ["StageOne"]

_PLAIN, _TUNED = "plain torch", "tuned torch"
_TOLERANCE, _HASH_TOLERANCE, _STEP_TOLERANCE = 2e-5, 1e-4, 5e-3
# Of tensor cores: rounding to half opens or shuts the gates of one hidden value in a thousand, and 0.1 % of the terms
# are 3 % of a gradient's norm (tests/cuda_emulation compares tightly, with an oracle that rounds alike).
_HALF_TOLERANCE = 5e-2
_SHRINK = {"large": 1, "medium": 4, "small": 16}  # a large tensor must not land in what a small one left of the heap
_SMOKE_SHRINK = 256
_FLOAT = 4  # bytes
REPEATED.add("ops")

Form = Callable[..., Tensors]  # differentiable inputs -> outputs


def _sizes(context: BenchContext) -> dict[str, int]:
    """Name of a size -> what the largest is divided by."""
    return {"smoke": _SMOKE_SHRINK} if context.is_smoke else _SHRINK


def _native(form: Form) -> Form:
    """The form on our kernels: without them it is refused, and the family skipped."""

    @functools.wraps(form)
    def run(*inputs: torch.Tensor) -> Tensors:
        with ops.use_backend("native"):
            return form(*inputs)

    return run


@dataclass(frozen=True)
class _Work:
    """What an op does on its inputs: for one forward; a backward is counted as `backward` times as much again."""

    amount: float
    unit: str
    n_bytes: float
    n_flops: float
    backward: float = 2.0


def _comparisons(
    name: str,
    size: str,
    ours: Form,
    peers: Mapping[str, Form],
    reference: Form,
    inputs: Tensors,
    cotangents: Tensors,
    work: _Work,
    *,
    exact: torch.dtype = torch.float64,
    tolerance: float = _TOLERANCE,
) -> Iterator[Comparison]:
    """`forward`, and `forward_backward` with the gradients of the inputs that require one where any does."""

    def forward(form: Form, dtype: torch.dtype = torch.float32) -> Callable[[], Tensors]:
        @torch.no_grad()
        def run() -> Tensors:
            return form(*(t.to(dtype) for t in inputs))

        return run

    def backward(form: Form, dtype: torch.dtype = torch.float32) -> Callable[[], Tensors]:
        def run() -> Tensors:
            leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in inputs]
            outputs = form(*leaves)
            wanted = [t for t in leaves if t.requires_grad]
            return torch.autograd.grad(outputs, wanted, [c.to(dtype) for c in cotangents])

        return run

    kinds = {"forward": (forward, 1.0)}
    if any(t.requires_grad for t in inputs):
        kinds["forward_backward"] = (backward, 1.0 + work.backward)
    for kind, (bound, share) in kinds.items():
        run, theirs = bound(_native(ours)), {peer: bound(form) for peer, form in peers.items()}
        judged = [theirs[peer] for peer, form in peers.items() if form is not reference or exact != torch.float32]
        yield Comparison(
            name=f"{name}/{kind}/{size}",
            run=run,
            verify=functools.partial(worst_error, [run, *judged], bound(reference, exact)),
            tolerance=tolerance,
            peers=theirs,
            work=work.amount,
            work_unit=work.unit,
            n_bytes=share * work.n_bytes,
            n_flops=share * work.n_flops,
        )


def tuned_hash_encode(x: torch.Tensor, table: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    """The fastest torch form we know: per level one gather of all corners, and no gradient larger than its level."""
    corners = list(itertools.product((0, 1), repeat=3))
    sizes = [end - first for first, end in itertools.pairwise(spec.level_offsets)]
    levels = []
    for rows, scale, resolution in zip(table.split(sizes), spec.scales, spec.resolutions, strict=True):
        position = x.clamp(0, 1) * scale + 0.5
        cell = position.detach().floor()
        fraction, cell = position - cell, cell.long()
        side = torch.stack((1 - fraction, fraction))  # (2, n, 3)
        weight = torch.stack([side[a, :, 0] * side[b, :, 1] * side[c, :, 2] for a, b, c in corners])  # (8, n)
        shifts = [torch.tensor(c, device=x.device) for c in corners]
        index = torch.cat([corner_rows(cell + c, resolution, len(rows)) for c in shifts])
        values = rows.index_select(0, index).view(8, len(x), -1)
        levels.append((weight[..., None] * values).sum(0))
    return torch.cat(levels, 1)


@FAMILIES.register("ops/hash_encode")
def hash_encode(context: BenchContext) -> Iterator[Comparison]:
    """Up to 2^18 random points, T = 2^19 (a table as much smaller as there are fewer points); gradient of the table."""
    for size, shrink in _sizes(context).items():
        spec = HashGridSpec(log2_hashmap_size=19 - shrink.bit_length() + 1)  # 16 levels x 2 features, 16 -> 2048
        rng, n = step_generator(0, "hash_encode"), 2**18 // shrink
        x = torch.rand(n, 3, generator=rng).to(context.device)
        table = torch.randn(spec.n_entries, spec.n_features_per_level, generator=rng) * 0.1
        cotangent = torch.randn(spec.output_dim, n, generator=rng).to(context.device).t()
        read = 8 * spec.output_dim * n  # a corner's features, each once

        def plain(t: torch.Tensor, x: torch.Tensor = x, spec: HashGridSpec = spec) -> Tensors:
            return [plain_hash_encode(x, t, spec)]

        yield from _comparisons(
            "hash_encode",
            size,
            lambda t, x=x, spec=spec: [ops.hash_encode(x, t, spec)],
            {
                _PLAIN: plain,
                _TUNED: lambda t, x=x, spec=spec: [tuned_hash_encode(x, t, spec)],
            },
            plain,
            [table.to(context.device).requires_grad_()],
            [cotangent],
            _Work(n, "points", _FLOAT * (read + spec.output_dim * n + 3 * n), 2 * read, backward=1.0),
            exact=torch.float32,
            tolerance=_HASH_TOLERANCE,
        )


@dataclass(frozen=True)
class _Rays:
    """Packed samples of rays with equal counts; densities leave a fifth of the light after the last sample."""

    sigmas: torch.Tensor
    t_starts: torch.Tensor
    t_ends: torch.Tensor
    rgbs: torch.Tensor
    ray_offsets: torch.Tensor

    @staticmethod
    def random(rng: torch.Generator, n_rays: int, n_samples: int, device: torch.device) -> _Rays:
        total, step = n_rays * n_samples, 1.0 / n_samples
        t_starts = (torch.arange(n_samples) * step).repeat(n_rays).to(device)
        sigmas = (torch.rand(total, generator=rng) * 3.2).to(device)
        rgbs = torch.rand(total, 3, generator=rng).to(device)
        return _Rays(sigmas, t_starts, t_starts + step, rgbs, (torch.arange(n_rays + 1) * n_samples).to(device))

    def ts(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.t_starts.to(dtype), self.t_ends.to(dtype)


def _our_composite(rays: _Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """rgb, depth, opacity, features per ray; no early stop, as the plain form has none."""
    return ops.composite(sigmas, *rays.ts(sigmas.dtype), rgbs, rays.ray_offsets, features, early_stop_eps=0.0)[:4]


def _tuned_composite(rays: _Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """The same with one running sum over all samples and index_add."""
    return composite_packed(sigmas, *rays.ts(sigmas.dtype), rgbs, features, rays.ray_offsets)[:4]


def _plain_composite(rays: _Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """The same by the oracle."""
    return plain_composite(sigmas, *rays.ts(sigmas.dtype), rgbs, features, rays.ray_offsets, early_stop_eps=0.0)[:4]


_N_RAYS, _N_SAMPLES, _CHANNELS, _HIDDEN = 4096, 64, 256, 64


@FAMILIES.register("ops/composite")
def composite(context: BenchContext) -> Iterator[Comparison]:
    """Up to 4096 rays x 64 samples with 256 feature channels; gradients of densities, colours and features."""
    for size, shrink in _sizes(context).items():
        rng, n_rays = step_generator(0, "composite"), _N_RAYS // shrink
        rays = _Rays.random(rng, n_rays, _N_SAMPLES, context.device)
        n = len(rays.sigmas)
        features = torch.randn(n, _CHANNELS, generator=rng).to(context.device)
        yield from _comparisons(
            "composite",
            size,
            functools.partial(_our_composite, rays),
            {_PLAIN: functools.partial(_plain_composite, rays), _TUNED: functools.partial(_tuned_composite, rays)},
            functools.partial(_plain_composite, rays),
            [t.requires_grad_() for t in (rays.sigmas, rays.rgbs, features)],
            [torch.randn(n_rays, *s, generator=rng).to(context.device) for s in ((3,), (), (), (_CHANNELS,))],
            _Work(n, "samples", _FLOAT * n * (_CHANNELS + 6), 2 * n * (_CHANNELS + 8)),
        )


@FAMILIES.register("ops/deferred")
def deferred(context: BenchContext) -> Iterator[Comparison]:
    """PoseMap head: composite 64 then project each ray, against project each sample (64 -> 256) and composite."""
    per_sample_name = "per sample, native composite"
    for size, shrink in _sizes(context).items():
        rng, n_rays = step_generator(0, "deferred"), _N_RAYS // shrink
        rays = _Rays.random(rng, n_rays, _N_SAMPLES, context.device)
        n = len(rays.sigmas)
        hidden = torch.randn(n, _HIDDEN, generator=rng)
        weight, bias = torch.randn(_CHANNELS, _HIDDEN, generator=rng) / 8, torch.randn(_CHANNELS, generator=rng)
        inputs = [t.to(context.device).requires_grad_() for t in (rays.sigmas, hidden, weight, bias)]

        def per_ray(form: Form, rays: _Rays, sigmas: torch.Tensor, h: torch.Tensor, *layer: torch.Tensor) -> Tensors:
            _, _, opacity, summed = form(rays, sigmas, rays.rgbs.to(sigmas.dtype), h)
            return [F.linear(summed, layer[0]) + opacity[:, None] * layer[1]]

        def per_sample(rays: _Rays, sigmas: torch.Tensor, h: torch.Tensor, *layer: torch.Tensor) -> Tensors:
            return [_our_composite(rays, sigmas, rays.rgbs, F.linear(h, *layer))[3]]

        yield from _comparisons(
            "deferred",
            size,
            functools.partial(per_ray, _our_composite, rays),
            {per_sample_name: functools.partial(per_sample, rays)},
            functools.partial(per_ray, _plain_composite, rays),
            inputs,
            [torch.randn(n_rays, _CHANNELS, generator=rng).to(context.device)],
            _Work(n, "samples", _FLOAT * n * (_HIDDEN + 6), 2 * n * (_HIDDEN + 8) + 2 * n_rays * _HIDDEN * _CHANNELS),
        )


@FAMILIES.register("ops/fused_mlp")
def fused_mlp(context: BenchContext) -> Iterator[Comparison]:
    """32-64-64-16 without bias on up to 2^17 rows; gradients of rows and parameters."""
    spec = MLPSpec((32, 64, 64, 16))
    for size, shrink in _sizes(context).items():
        rng, n = step_generator(0, "fused_mlp"), 2**17 // shrink
        params = torch.cat([torch.randn(o * i, generator=rng) * (2 / i) ** 0.5 for o, i in spec.layer_shapes])
        x = torch.randn(n, spec.dims[0], generator=rng)
        yield from _comparisons(
            "fused_mlp",
            size,
            lambda x, p: [ops.fused_mlp(x, p, spec)],
            {_PLAIN: lambda x, p: [plain_mlp(x, p, spec.dims)]},
            lambda x, p: [plain_mlp(x, p, spec.dims)],
            [t.to(context.device).requires_grad_() for t in (x, params)],
            [torch.randn(n, spec.dims[-1], generator=rng).to(context.device)],
            _Work(n, "rows", _FLOAT * n * (spec.dims[0] + spec.dims[-1]), 2 * n * spec.n_params),
            tolerance=_TOLERANCE if context.device.type == "cpu" else _HALF_TOLERANCE,
        )


@FAMILIES.register("ops/sh_encode")
def sh_encode(context: BenchContext) -> Iterator[Comparison]:
    """Spherical harmonics of degree 4 of up to 2^18 directions; gradient of the directions."""
    for size, shrink in _sizes(context).items():
        rng, n = step_generator(0, "sh_encode"), 2**18 // shrink
        directions = F.normalize(torch.randn(n, 3, generator=rng), dim=1).to(context.device).requires_grad_()
        yield from _comparisons(
            "sh_encode",
            size,
            lambda d: [ops.sh_encode(d, 4)],
            {_PLAIN: lambda d: [plain_sh_encode(d, 4)]},
            lambda d: [plain_sh_encode(d, 4)],
            [directions],
            [torch.randn(n, 16, generator=rng).to(context.device)],
            _Work(n, "directions", _FLOAT * n * 19, 60.0 * n, backward=1.0),
        )


def _march(form: Callable[..., Tensors], fixed: Mapping[str, Any], origins: torch.Tensor, d: torch.Tensor) -> Tensors:
    return list(form(origins, d, **fixed))


@FAMILIES.register("ops/march")
def march(context: BenchContext) -> Iterator[Comparison]:
    """Up to 2^14 rays through a grid of 64^3 cells, a tenth of them occupied; no gradient."""
    spec = MarchSpec(resolution=16 if context.is_smoke else 64, n_cascades=1, step_min=1 / 192, step_max=1 / 192)
    for size, shrink in _sizes(context).items():
        rng, n = step_generator(0, "march"), 2**14 // shrink
        bits = ops.pack_bits((torch.rand(spec.n_cells, generator=rng) < 0.1).float(), 0.5).to(context.device)
        origins = 0.5 + 0.2 * torch.randn(n, 3, generator=rng)
        rays = [t.to(context.device) for t in (origins, F.normalize(torch.randn(n, 3, generator=rng), dim=1))]
        near, far = (torch.full((n,), value, device=context.device) for value in (0.01, 1e4))
        box = torch.tensor([[0.0] * 3, [1.0] * 3], device=context.device)
        fixed = {"near": near, "far": far, "aabb": box, "bitfield": bits, "spec": spec, "jitter": None}
        forms = [functools.partial(_march, form, fixed) for form in (ops.march, plain_march)]
        n_samples = len(forms[0](*rays)[1])
        yield from _comparisons(
            "march",
            size,
            forms[0],
            {_PLAIN: forms[1]},
            forms[1],
            rays,
            [],
            _Work(n, "rays", _FLOAT * (8.0 * n + 2 * n_samples), 0.0),
            exact=torch.float32,  # a cell's border falls to one side or the other by rounding
        )


def _compact(form: Callable[..., Tensors], fixed: Mapping[str, Any], sigmas: torch.Tensor) -> Tensors:
    return list(form(sigmas, transmittance_eps=1e-3, alpha_eps=0.0, **fixed))


@FAMILIES.register("ops/compact")
def compact(context: BenchContext) -> Iterator[Comparison]:
    """Samples that can be seen, of up to 4096 rays x 64; no gradient."""
    for size, shrink in _sizes(context).items():
        rays = _Rays.random(step_generator(0, "compact"), _N_RAYS // shrink, _N_SAMPLES, context.device)
        n = len(rays.sigmas)
        fixed = {"t_starts": rays.t_starts, "t_ends": rays.t_ends, "ray_offsets": rays.ray_offsets}
        ours, theirs = (functools.partial(_compact, form, fixed) for form in (ops.compact, plain_compact))
        yield from _comparisons(
            "compact",
            size,
            ours,
            {_PLAIN: theirs},
            theirs,
            [10 * rays.sigmas],
            [],
            _Work(n, "samples", _FLOAT * 3.0 * n, 4.0 * n),
            exact=torch.float32,  # the threshold falls to one side or the other by rounding
        )


@dataclass
class StageOne:
    """A radiance field in training: hash grid -> density network -> colour network -> composite -> MSE -> Adam."""

    encode: Callable[..., torch.Tensor]
    radiance: Callable[..., Tensors]
    volume: Form
    device: torch.device
    n_rays: int

    N_SAMPLES = 64
    HEADS = RadianceSpec(MLPSpec((32, 64, 16)), MLPSpec((32, 64, 64, 3)))  # colour: 16 of density + 16 of direction

    def __post_init__(self) -> None:
        rng = step_generator(0, "stage_one")
        self.grid = HashGridSpec(log2_hashmap_size=16)
        self.rays = _Rays.random(rng, self.n_rays, self.N_SAMPLES, self.device)
        origins = 0.5 + 0.1 * torch.randn(self.n_rays, 3, generator=rng)
        directions = F.normalize(torch.randn(self.n_rays, 3, generator=rng), dim=1)
        t = torch.lerp(self.rays.t_starts, self.rays.t_ends, 0.5) * 0.5
        self.ray = torch.arange(self.n_rays).repeat_interleave(self.N_SAMPLES).to(self.device)
        origins, directions = origins.to(self.device), directions.to(self.device)
        self.points = (origins[self.ray] + t[:, None] * directions[self.ray]).clamp(0, 1)
        self.directions = torch.randn(self.n_rays, 16, generator=rng).to(self.device)  # encoded: 16 numbers per ray
        self.pixels = torch.rand(self.n_rays, 3, generator=rng).to(self.device)
        table = torch.randn(self.grid.n_entries, self.grid.n_features_per_level, generator=rng) * 0.1
        networks = [
            torch.cat([torch.randn(o * i, generator=rng) * (2 / i) ** 0.5 for o, i in spec.layer_shapes])
            for spec in (self.HEADS.density, self.HEADS.colour)
        ]
        self.parameters = [p.to(self.device).requires_grad_() for p in (table, *networks)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-2, eps=1e-15, fused=True)

    def loss(self) -> torch.Tensor:
        """Mean squared colour error of the rays, ()."""
        table, density, colour = self.parameters
        encoding = self.encode(self.points, table, self.grid)
        sigmas, rgbs, _ = self.radiance(encoding, density, colour, self.directions, self.ray, self.HEADS)
        rgb = self.volume(self.rays, sigmas, rgbs, sigmas.new_zeros(len(sigmas), 0))[0]
        return F.mse_loss(rgb, self.pixels)

    def gradients(self) -> Tensors:
        """Loss and gradient of each parameter; changes nothing."""
        loss = self.loss()
        return (loss.detach(), *torch.autograd.grad(loss, self.parameters))

    def step(self) -> None:
        """One optimisation step."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def _plain_radiance(
    x: torch.Tensor,
    density: torch.Tensor,
    colour: torch.Tensor,
    view: torch.Tensor,
    rays: torch.Tensor,
    spec: RadianceSpec,
) -> Tensors:
    activation = (spec.bias, spec.max_log_density)
    return plain_radiance(x, density, spec.density.dims, view, rays, colour, spec.colour.dims, *activation)


@FAMILIES.register("ops/stage_one")
def stage_one(context: BenchContext) -> Iterator[Comparison]:
    """A whole training step on up to 65 536 samples, T = 2^16; all sides use torch's fused Adam."""
    for size, shrink in _sizes(context).items():
        place = (context.device, max(4, 1024 // shrink))
        exact = StageOne(plain_hash_encode, _plain_radiance, _plain_composite, *place)
        ours = StageOne(ops.hash_encode, ops.fused_radiance, _our_composite, *place)
        peers = {
            _PLAIN: StageOne(plain_hash_encode, _plain_radiance, _plain_composite, *place),
            _TUNED: StageOne(tuned_hash_encode, _plain_radiance, _tuned_composite, *place),
        }
        native = _native(lambda ours=ours: ours.gradients())
        case = Comparison(
            name=f"stage_one/step/{size}",
            run=_native(lambda ours=ours: ours.step()),
            verify=functools.partial(
                worst_error, [native, *(peer.gradients for peer in peers.values())], exact.gradients
            ),
            tolerance=_STEP_TOLERANCE if context.device.type == "cpu" else _HALF_TOLERANCE,
            peers={name: peer.step for name, peer in peers.items()},
            work=place[1],
            work_unit="rays",
        )
        yield replace(case, notes={"samples per ray": float(StageOne.N_SAMPLES)})
