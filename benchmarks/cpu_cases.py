"""The cases of benchmarks/cpu_kernels.py: inputs, our form, the plain torch form, the reference, and a tolerance.

Tolerances are relative 2-norms. Against a float64 reference 2e-5 allows float32 sums of the sizes used here; the
hash encoding is judged by the float32 reference, since at resolution 2048 the position itself is rounded to 1e-4 cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from posemap_fast.ops.composite import composite
from posemap_fast.ops.fused_mlp import MLPSpec, fused_mlp
from posemap_fast.ops.fused_radiance import RadianceSpec, fused_radiance
from posemap_fast.ops.hash_encode import HashGridSpec, hash_encode
from posemap_fast.ops.reference.composite import composite as reference_composite
from posemap_fast.ops.reference.composite import composite_packed
from posemap_fast.ops.reference.fused_mlp import fused_mlp as reference_mlp
from posemap_fast.ops.reference.fused_radiance import fused_radiance as reference_radiance
from posemap_fast.ops.reference.hash_encode import corner_rows
from posemap_fast.ops.reference.hash_encode import hash_encode as reference_hash_encode
from posemap_fast.seeding import step_generator

__all__ = ["CASES", "Tensors", "Timing"]

Tensors = Sequence[torch.Tensor]
TOLERANCE = 2e-5
HASH_TOLERANCE = 1e-4
STEP_TOLERANCE = 1e-3
PLAIN = "plain torch"  # ops.reference: the readable form of each op, which also runs where no compiler is found
TUNED = "tuned torch"  # the fastest torch form we could write


@dataclass(frozen=True)
class Timing:
    """Three ways to the same tensors: ours, the plain torch form, and the reference that judges both."""

    ours: Callable[[], Tensors]
    peer: Callable[[], Tensors]
    reference: Callable[[], Tensors]
    peer_name: str
    tolerance: float = TOLERANCE
    timed: tuple[Callable[[], object], Callable[[], object]] | None = None  # ours, peer; None: the two above


Timings = Iterator[tuple[str, Timing]]
Form = Callable[..., Tensors]  # differentiable inputs -> outputs


def forward_and_backward(
    ours: Form,
    peers: Mapping[str, Form],
    reference: Form,
    inputs: Tensors,
    cotangents: Tensors,
    *,
    exact: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
) -> Timings:
    """`forward` and `forward_backward` (gradients of the inputs that require one), ours against each named peer."""

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

    for name, kind in (("forward", forward), ("forward_backward", backward)):
        for peer_name, peer in peers.items():
            yield name, Timing(kind(ours), kind(peer), kind(reference, exact), peer_name, tolerance)


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
        index = torch.cat([corner_rows(cell + torch.tensor(c), resolution, len(rows)) for c in corners])
        values = rows.index_select(0, index).view(8, len(x), -1)
        levels.append((weight[..., None] * values).sum(0))
    return torch.cat(levels, 1)


def hash_encode_case() -> Timings:
    """2^18 random points, 16 levels x 2 features, T = 2^19, 16 -> 2048; gradient of the table."""
    rng, n = step_generator(0, "hash_encode"), 2**18
    spec = HashGridSpec()
    x = torch.rand(n, 3, generator=rng)
    table = (torch.randn(spec.n_entries, spec.n_features_per_level, generator=rng) * 0.1).requires_grad_()
    return forward_and_backward(
        lambda t: [hash_encode(x, t, spec)],
        {
            PLAIN: lambda t: [reference_hash_encode(x, t, spec)],
            TUNED: lambda t: [tuned_hash_encode(x, t, spec)],
        },
        lambda t: [reference_hash_encode(x, t, spec)],
        [table],
        [torch.randn(spec.output_dim, n, generator=rng).t()],
        exact=torch.float32,
        tolerance=HASH_TOLERANCE,
    )


@dataclass(frozen=True)
class Rays:
    """Packed samples of rays with equal counts; densities leave a fifth of the light after the last sample."""

    sigmas: torch.Tensor
    t_starts: torch.Tensor
    t_ends: torch.Tensor
    rgbs: torch.Tensor
    ray_offsets: torch.Tensor

    @staticmethod
    def random(rng: torch.Generator, n_rays: int, n_samples: int) -> Rays:
        total, step = n_rays * n_samples, 1.0 / n_samples
        t_starts = (torch.arange(n_samples) * step).repeat(n_rays)
        sigmas = torch.rand(total, generator=rng) * 3.2
        rgbs = torch.rand(total, 3, generator=rng)
        return Rays(sigmas, t_starts, t_starts + step, rgbs, torch.arange(n_rays + 1) * n_samples)


def native_composite(rays: Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """rgb, depth, opacity, features per ray by the native op; no early stop, as the plain form has none."""
    return composite(sigmas, rays.t_starts, rays.t_ends, rgbs, rays.ray_offsets, features, early_stop_eps=0.0)[:4]


def tuned_composite(rays: Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """The same with one running sum over all samples and index_add."""
    t_starts, t_ends = rays.t_starts.to(sigmas.dtype), rays.t_ends.to(sigmas.dtype)
    return composite_packed(sigmas, t_starts, t_ends, rgbs, features, rays.ray_offsets)[:4]


def exact_composite(rays: Rays, sigmas: torch.Tensor, rgbs: torch.Tensor, features: torch.Tensor) -> Tensors:
    """The same by the oracle."""
    t_starts, t_ends = rays.t_starts.to(sigmas.dtype), rays.t_ends.to(sigmas.dtype)
    return reference_composite(sigmas, t_starts, t_ends, rgbs, features, rays.ray_offsets, early_stop_eps=0.0)[:4]


def composite_case() -> Timings:
    """4096 rays x 64 samples with 256 feature channels; gradients of densities, colours and features."""
    rng = step_generator(0, "composite")
    rays = Rays.random(rng, 4096, 64)
    features = torch.randn(len(rays.sigmas), 256, generator=rng)
    inputs = [t.requires_grad_() for t in (rays.sigmas, rays.rgbs, features)]
    return forward_and_backward(
        lambda *t: native_composite(rays, *t),
        {PLAIN: lambda *t: exact_composite(rays, *t), TUNED: lambda *t: tuned_composite(rays, *t)},
        lambda *t: exact_composite(rays, *t),
        inputs,
        [torch.randn(4096, *shape, generator=rng) for shape in ((3,), (), (), (256,))],
    )


def deferred_case() -> Timings:
    """PoseMap head on the same samples: composite 64 then project each ray, against project each sample (64 -> 256)."""
    rng = step_generator(0, "deferred")
    rays = Rays.random(rng, 4096, 64)
    hidden = torch.randn(len(rays.sigmas), 64, generator=rng)
    weight, bias = torch.randn(256, 64, generator=rng) / 8, torch.randn(256, generator=rng)

    def deferred(form: Form, sigmas: torch.Tensor, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Tensors:
        _, _, opacity, summed = form(rays, sigmas, rays.rgbs.to(sigmas.dtype), h)
        return [F.linear(summed, w) + opacity[:, None] * b]

    def per_sample(sigmas: torch.Tensor, h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Tensors:
        return [native_composite(rays, sigmas, rays.rgbs, F.linear(h, w, b))[3]]

    return forward_and_backward(
        lambda *t: deferred(native_composite, *t),
        {"per sample, native composite": per_sample},
        lambda *t: deferred(exact_composite, *t),
        [t.requires_grad_() for t in (rays.sigmas, hidden, weight, bias)],
        [torch.randn(4096, 256, generator=rng)],
    )


def fused_mlp_case() -> Timings:
    """32-64-64-16 without bias on 2^17 rows; gradients of rows and parameters."""
    rng, spec = step_generator(0, "fused_mlp"), MLPSpec((32, 64, 64, 16))
    params = torch.cat([torch.randn(o * i, generator=rng) * (2 / i) ** 0.5 for o, i in spec.layer_shapes])
    x = torch.randn(2**17, 32, generator=rng)
    return forward_and_backward(
        lambda x, p: [fused_mlp(x, p, spec)],
        {PLAIN: lambda x, p: [reference_mlp(x, p, spec.dims)]},
        lambda x, p: [reference_mlp(x, p, spec.dims)],
        [x.requires_grad_(), params.requires_grad_()],
        [torch.randn(2**17, 16, generator=rng)],
    )


@dataclass
class StageOne:
    """A radiance field in training: hash grid -> density network -> colour network -> composite -> MSE -> Adam."""

    encode: Callable[..., torch.Tensor]
    radiance: Callable[..., Tensors]
    volume: Form

    N_RAYS, N_SAMPLES = 1024, 64
    GRID = HashGridSpec(log2_hashmap_size=16)
    HEADS = RadianceSpec(MLPSpec((32, 64, 16)), MLPSpec((32, 64, 64, 3)))  # colour: 16 of density + 16 of direction

    def __post_init__(self) -> None:
        rng = step_generator(0, "stage_one")
        self.rays = Rays.random(rng, self.N_RAYS, self.N_SAMPLES)
        origins = 0.5 + 0.1 * torch.randn(self.N_RAYS, 3, generator=rng)
        directions = F.normalize(torch.randn(self.N_RAYS, 3, generator=rng), dim=1)
        t = torch.lerp(self.rays.t_starts, self.rays.t_ends, 0.5) * 0.5
        self.ray = torch.arange(self.N_RAYS).repeat_interleave(self.N_SAMPLES)
        self.points = (origins[self.ray] + t[:, None] * directions[self.ray]).clamp(0, 1)
        self.directions = torch.randn(self.N_RAYS, 16, generator=rng)  # encoded directions: 16 numbers per ray
        self.pixels = torch.rand(self.N_RAYS, 3, generator=rng)
        table = torch.randn(self.GRID.n_entries, self.GRID.n_features_per_level, generator=rng) * 0.1
        networks = [
            torch.cat([torch.randn(o * i, generator=rng) * (2 / i) ** 0.5 for o, i in spec.layer_shapes])
            for spec in (self.HEADS.density, self.HEADS.colour)
        ]
        self.parameters = [p.requires_grad_() for p in (table, *networks)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-2, eps=1e-15, fused=True)

    def loss(self) -> torch.Tensor:
        """Mean squared colour error of the rays, ()."""
        table, density, colour = self.parameters
        encoding = self.encode(self.points, table, self.GRID)
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


def stage_one_case() -> Timings:
    """A whole training step on 65 536 samples, T = 2^16; all sides use torch's fused Adam."""

    def plain_radiance(
        x: torch.Tensor,
        density: torch.Tensor,
        colour: torch.Tensor,
        view: torch.Tensor,
        rays: torch.Tensor,
        spec: RadianceSpec,
    ) -> Tensors:
        dims, activation = (spec.density.dims, spec.colour.dims), (spec.bias, spec.max_log_density)
        return reference_radiance(x, density, dims[0], view, rays, colour, dims[1], *activation)

    exact = StageOne(reference_hash_encode, plain_radiance, exact_composite)
    forms = {PLAIN: (reference_hash_encode, exact_composite), TUNED: (tuned_hash_encode, tuned_composite)}
    for name, (encode, volume) in forms.items():
        ours = StageOne(hash_encode, fused_radiance, native_composite)  # afresh: timing trains it
        peer = StageOne(encode, plain_radiance, volume)
        gradients = (ours.gradients, peer.gradients, exact.gradients)
        yield "step", Timing(*gradients, name, STEP_TOLERANCE, (ours.step, peer.step))


CASES: dict[str, Callable[[], Timings]] = {
    "hash_encode": hash_encode_case,
    "composite": composite_case,
    "deferred": deferred_case,
    "fused_mlp": fused_mlp_case,
    "stage_one": stage_one_case,
}
