"""Multiresolution hash encoding of points (Mueller et al. 2022, arXiv:2201.05989): value and both gradients.

Convention: tiny-cuda-nn's, so that tables can be exchanged. Level l has scale_l = base * b^l - 1 with
b = (finest / base)^(1 / (n_levels - 1)), resolution_l = ceil(scale_l) + 1, and a point sits at x * scale_l + 0.5.
A level has min(resolution^3 rounded up to 8, 2^T) rows; it is indexed densely when the corners fit, hashed otherwise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.ops._faces import face_of
from posemap_fast.ops._memory import empty
from posemap_fast.ops._register import define_op
from posemap_fast.ops.reference.hash_encode import hash_encode as reference_hash_encode
from posemap_fast.ops.reference.hash_encode import hash_encode_gradients as reference_gradients

__all__ = ["HashGridSpec", "hash_encode"]

_FEATURES = (1, 2, 4, 8)
_MAX_RESOLUTION = 1 << 22  # a float32 position in a finer grid has no fraction left


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True)
class HashGridSpec:
    """Shape of a hash grid; derived sizes are computed once per instance.

    Raises:
        ShapeError: a value out of range.
    """

    n_levels: int = 16  # >= 1
    n_features_per_level: int = 2  # 1, 2, 4 or 8
    log2_hashmap_size: int = 19  # 3 to 24: at most 2^T rows per level
    base_resolution: int = 16  # cells per axis of level 0, >= 1
    finest_resolution: int = 2048  # cells per axis of the last level, >= base_resolution

    def __post_init__(self) -> None:
        ranges = {
            "n_levels": (1, 64),
            "log2_hashmap_size": (3, 24),
            "base_resolution": (1, _MAX_RESOLUTION),
            "finest_resolution": (self.base_resolution, _MAX_RESOLUTION),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ShapeError(f"HashGridSpec: {name} must be in [{low}, {high}]; got {getattr(self, name)}")
        if self.n_features_per_level not in _FEATURES:
            raise ShapeError(
                f"HashGridSpec: n_features_per_level must be one of {_FEATURES}; got {self.n_features_per_level}"
            )

    @functools.cached_property
    def scales(self) -> tuple[float, ...]:
        """Position = x * scale + 0.5. Rounded to float32, as tiny-cuda-nn has them; a single level is level 0."""
        growth = self.finest_resolution / self.base_resolution
        steps = max(self.n_levels - 1, 1)
        return tuple(_float32(self.base_resolution * growth ** (i / steps) - 1.0) for i in range(self.n_levels))

    @functools.cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Grid points per axis that a dense level stores."""
        return tuple(math.ceil(scale) + 1 for scale in self.scales)

    @functools.cached_property
    def level_offsets(self) -> tuple[int, ...]:
        """First row of each level in the table, and the total: n_levels + 1 values, in entries."""
        offsets = [0]
        for resolution in self.resolutions:
            rows = (resolution**3 + 7) // 8 * 8
            offsets.append(offsets[-1] + min(rows, 1 << self.log2_hashmap_size))
        return tuple(offsets)

    @property
    def n_entries(self) -> int:
        """Rows of the table over all levels."""
        return self.level_offsets[-1]

    @property
    def output_dim(self) -> int:
        """Features per point: n_levels * n_features_per_level."""
        return self.n_levels * self.n_features_per_level

    @functools.cached_property
    def native_arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """Scales, resolutions, offsets, n_levels, n_features as the C functions take them."""
        return (
            torch.tensor(self.scales, dtype=torch.float64),
            torch.tensor(self.resolutions, dtype=torch.int64),
            torch.tensor(self.level_offsets, dtype=torch.int64),
            self.n_levels,
            self.n_features_per_level,
        )


def hash_encode(x: torch.Tensor, table: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    """Features of points: trilinear interpolation of table rows, level after level.

        out[:, l F : (l + 1) F] = sum over the 8 corners c of w_c(x) table[row_l(c)]

    Convention: x in field units, clamped to [0, 1]; the gradient in x is 0 where it was clamped (exactly 0 and 1
    are inside). NaN counts as 0 with gradient 0: a bad point never reads outside the table.
    Args:
        x: (n, 3) float32/64, points in the unit cube.
        table: (spec.n_entries, spec.n_features_per_level) same dtype and device; float16 is taken with float32 points
            (half the memory traffic on a GPU; converted elsewhere), its gradient is summed in float32.
        spec: levels, rows and resolutions.
    Returns:
        (n, spec.output_dim) view of a contiguous (spec.output_dim, n) buffer: level-major order is what makes large
        tables fast; call `.contiguous()` only if a consumer needs rows.
    Raises:
        ShapeError: wrong shape, dtype or device.
    Differentiable once, in table and x; a part that is not needed is not computed. The table gradient is dense and
    bitwise repeatable (a level belongs to one thread). A gradient that is a view of (output_dim, n) is not copied.
    Reference: `ops.reference.hash_encode`.
    """
    expect_shape("hash_encode", "x", x, (None, 3))
    expect_shape("hash_encode", "table", table, (spec.n_entries, spec.n_features_per_level))
    expect_dtype("hash_encode", "x", x, (torch.float32, torch.float64))
    half = (torch.float16,) if x.dtype == torch.float32 else ()
    expect_dtype("hash_encode", "table", table, (x.dtype, *half))
    expect_same_device("hash_encode", x=x, table=table)
    return _op(x, table, *_numbers(spec))


def _numbers(spec: HashGridSpec) -> tuple[int, int, int, int, int]:
    return (
        spec.n_levels,
        spec.n_features_per_level,
        spec.log2_hashmap_size,
        spec.base_resolution,
        spec.finest_resolution,
    )


_spec = functools.lru_cache(maxsize=256)(HashGridSpec)  # spec of the numbers that travel through the schema


_ALIGNMENT = 16  # bytes: the CUDA kernels fetch rows in words of up to this size


def _aligned(table: torch.Tensor) -> torch.Tensor:
    """Contiguous, and at an address that whole words can be read from."""
    table = table.contiguous()
    return table.clone() if table.data_ptr() % _ALIGNMENT else table


def _forward(x: torch.Tensor, table: torch.Tensor, *numbers: int) -> torch.Tensor:
    spec = _spec(*numbers)
    face = face_of(x)
    has_half_face = face is not None and face.device == "cuda" and x.dtype == torch.float32
    if table.dtype != x.dtype and not has_half_face:
        table = table.to(x.dtype)
    if face is None:
        return reference_hash_encode(x, table, spec)
    out = empty(x, spec.output_dim, len(x))
    if table.dtype != x.dtype:
        inputs = (x.contiguous(), len(x), _aligned(table))
        face.run("pmf_hash_encode_cuda_f16table_f32", x, *inputs, *spec.native_arguments, out)
        return out.t()
    face.call("hash_encode", x, x.contiguous(), len(x), _aligned(table), *spec.native_arguments, out)
    return out.t()


def _forward_fake(x: torch.Tensor, table: torch.Tensor, *numbers: int) -> torch.Tensor:
    return x.new_empty(_spec(*numbers).output_dim, x.shape[0]).t()


def _backward_table(grad: torch.Tensor, x: torch.Tensor, *numbers: int) -> torch.Tensor:
    spec = _spec(*numbers)
    face = face_of(x)
    if face is None:
        return reference_gradients(grad, x, None, spec)
    grad_table = empty(x, spec.n_entries, spec.n_features_per_level)
    columns = grad.t().contiguous()
    face.call("hash_encode_backward_table", x, x.contiguous(), len(x), columns, *spec.native_arguments, grad_table)
    return grad_table


def _backward_table_fake(grad: torch.Tensor, x: torch.Tensor, *numbers: int) -> torch.Tensor:
    spec = _spec(*numbers)
    return x.new_empty(spec.n_entries, spec.n_features_per_level)


def _backward_x(grad: torch.Tensor, x: torch.Tensor, table: torch.Tensor, *numbers: int) -> torch.Tensor:
    spec, table = _spec(*numbers), table.to(x.dtype)
    face = face_of(x)
    if face is None:
        return reference_gradients(grad, x, table, spec)
    grad_x = x.new_empty(len(x), 3)
    inputs = (x.contiguous(), len(x), grad.t().contiguous(), _aligned(table))
    face.call("hash_encode_backward_x", x, *inputs, *spec.native_arguments, grad_x)
    return grad_x


def _backward_x_fake(grad: torch.Tensor, x: torch.Tensor, table: torch.Tensor, *numbers: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], 3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, table, *numbers = inputs
    ctx.save_for_backward(x, table)
    ctx.numbers = numbers


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, table = ctx.saved_tensors
    need_x, need_table = ctx.needs_input_grad[:2]
    grad_x = _op_backward_x(grad, x, table, *ctx.numbers) if need_x else None
    grad_table = _op_backward_table(grad, x, *ctx.numbers).to(table.dtype) if need_table else None
    return grad_x, grad_table, *(None for _ in ctx.numbers)


def _refuse_twice(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError(
        "hash_encode is differentiable once; its gradient has no derivative (create_graph=True was used)"
    )


_INTS = "int n_levels, int n_features, int log2_hashmap_size, int base_resolution, int finest_resolution"
_op = define_op(
    f"hash_encode(Tensor x, Tensor table, {_INTS}) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_op_backward_table = define_op(
    f"hash_encode_backward_table(Tensor grad, Tensor x, {_INTS}) -> Tensor",
    _backward_table,
    _backward_table_fake,
    backward=_refuse_twice,
)
_op_backward_x = define_op(
    f"hash_encode_backward_x(Tensor grad, Tensor x, Tensor table, {_INTS}) -> Tensor",
    _backward_x,
    _backward_x_fake,
    backward=_refuse_twice,
)
