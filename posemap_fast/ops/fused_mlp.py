"""Small bias-free ReLU network whose activations never reach memory (after Müller et al. 2021, arXiv:2106.12372)."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.errors import BackendError, ConfigError, ShapeError
from posemap_fast.ops._faces import Face, face_of
from posemap_fast.ops._memory import empty
from posemap_fast.ops._register import define_op
from posemap_fast.ops.reference.fused_mlp import fused_mlp as reference_mlp
from posemap_fast.ops.reference.fused_mlp import fused_mlp_gradients as reference_gradients
from posemap_fast.ops.reference.fused_mlp import split_params

__all__ = ["MLPSpec", "c_dims", "empty_like_layout", "fused_mlp", "fused_mlp_backward", "fused_mlp_forward"]


@dataclass(frozen=True)
class MLPSpec:
    """Widths of the network: inputs, hidden layers, outputs; every matrix between neighbours has no bias."""

    dims: tuple[int, ...]  # (d_in, hidden..., d_out), each >= 1, at least one matrix

    def __post_init__(self) -> None:
        if len(self.dims) < 2 or any(not isinstance(d, int) or d < 1 for d in self.dims):
            raise ConfigError(f"MLPSpec: dims must be two or more positive integers; got {self.dims}")

    @property
    def layer_shapes(self) -> tuple[tuple[int, int], ...]:
        """(n_out, n_in) of each weight matrix, in the order in which `params` holds them."""
        return tuple((n_out, n_in) for n_in, n_out in itertools.pairwise(self.dims))

    @property
    def n_params(self) -> int:
        """Length of the flat parameter vector."""
        return sum(n_out * n_in for n_out, n_in in self.layer_shapes)

    def split(self, params: torch.Tensor) -> list[torch.Tensor]:
        """Views of the weight matrices (n_out, n_in) inside the flat `params` (n_params,)."""
        return split_params(params, self.dims)


def fused_mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: MLPSpec,
    extra: torch.Tensor | None = None,
    extra_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Bias-free multilayer perceptron: ReLU between the layers, linear output.

        h_0 = [x, extra],   h_{l+1} = relu(W_l h_l),   y = W_{L-1} h_{L-1}

    Convention: `params` holds W_0, W_1, ... one after the other, each (n_out, n_in) row-major.
    The gradient of the ReLU at 0 is 0. NaN and inf stay in their row of y and of the gradient of x.
    Args:
        x: (n, d_x) float32/64; row-major, column-major (`hash_encode`'s output) or any other strides, read in place.
        params: (n_params,) same dtype and device.
        spec: the widths; d_in = d_x, or d_x + d_extra.
        extra: further inputs beside x, not copied: (n, d_extra), or (n_extra, d_extra) with an index. Same dtype.
        extra_index: (n,) int64, sorted, in [0, n_extra): row i of the input ends with extra[extra_index[i]]. Made for
            features of rays: packed samples are sorted by ray.
    Returns:
        (n, d_out) row-major. The gradient of x has the memory layout of x, that of extra is row-major.
    Raises:
        ShapeError: shape, dtype or device do not fit.
        BackendError: a second derivative is asked for, or `extra_index` is not sorted or out of range.
    Differentiable once, in x, extra and params; a gradient that nobody needs is not computed.
    Cost: activations stay in the cache; the backward recomputes them. On the CPU the result is bitwise the same for
    any number of threads. Reference: `ops.reference.fused_mlp`.
    Example: dims (1, 2, 1), params [1, -1, 1, 1]  ->  y = relu(x) + relu(-x) = |x|
    """
    d_extra = 0 if extra is None else extra.shape[-1]
    expect_dtype("fused_mlp", "x", x, (torch.float32, torch.float64))
    expect_dtype("fused_mlp", "params", params, (x.dtype,))
    expect_shape("fused_mlp", "x", x, (None, spec.dims[0] - d_extra))
    expect_shape("fused_mlp", "params", params, (spec.n_params,))
    expect_same_device("fused_mlp", x=x, params=params)
    if extra is not None:
        expect_dtype("fused_mlp", "extra", extra, (x.dtype,))
        expect_shape("fused_mlp", "extra", extra, (len(x) if extra_index is None else None, d_extra))
        expect_same_device("fused_mlp", x=x, extra=extra)
    if extra_index is not None:
        if extra is None:
            raise ShapeError("fused_mlp: extra_index needs extra; got None")
        expect_dtype("fused_mlp", "extra_index", extra_index, (torch.int64,))
        expect_shape("fused_mlp", "extra_index", extra_index, (len(x),))
        expect_same_device("fused_mlp", x=x, extra_index=extra_index)
    return fused_mlp_forward(x, params, list(spec.dims), extra, extra_index)


_WIDEST_ON_GPU = 256


def _face(x: torch.Tensor, dims: list[int]) -> Face | None:
    """The kernel's face; the CUDA one is made of tensor core tiles: float32 rows and layers up to 256 wide."""
    face = face_of(x, cuda_dtypes=(torch.float32,))
    return None if face is not None and face.device == "cuda" and max(dims) > _WIDEST_ON_GPU else face


def _scratch(face: Face, x: torch.Tensor, dims: list[int], extra: torch.Tensor | None) -> Sequence[torch.Tensor]:
    width = 0 if extra is None else extra.shape[1]
    return face.scratch("fused_mlp_cuda_scratch", x, c_dims(dims), len(dims) - 1, len(x), width)


def c_dims(dims: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(dims))(*dims)


def empty_like_layout(x: torch.Tensor) -> torch.Tensor:
    """Empty (n, d): column-major when x is, else row-major."""
    n, width = x.shape
    if x.stride(0) == 1 and x.stride(1) != 1:
        return empty(x, width, n).t()
    return empty(x, n, width)


def _extra_arguments(x: torch.Tensor, extra: torch.Tensor | None, index: torch.Tensor | None) -> tuple[object, ...]:
    """Second part of the input as the C functions take it: rows, width, index, number of rows."""
    if extra is None:
        return None, 0, None, len(x)
    return extra.contiguous(), extra.shape[1], None if index is None else index.contiguous(), len(extra)


def _forward(
    x: torch.Tensor,
    params: torch.Tensor,
    dims: list[int],
    extra: torch.Tensor | None,
    extra_index: torch.Tensor | None,
) -> torch.Tensor:
    face = _face(x, dims)
    if face is None:
        return reference_mlp(x, params, dims, extra, extra_index)
    out = empty(x, x.shape[0], dims[-1])
    face.call(
        "fused_mlp",
        x,
        *(x, x.stride(0), x.stride(1), *_extra_arguments(x, extra, extra_index), params.contiguous()),
        *(c_dims(dims), len(dims) - 1, x.shape[0], out, *_scratch(face, x, dims, extra)),
    )
    return out


def _forward_fake(
    x: torch.Tensor,
    params: torch.Tensor,
    dims: list[int],
    extra: torch.Tensor | None,
    extra_index: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], dims[-1]))


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    params: torch.Tensor,
    dims: list[int],
    needs: list[bool],
    extra: torch.Tensor | None,
    extra_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, extra and params; one that is not in `needs` is an empty tensor."""
    buffers = _backward_fake(grad, x, params, dims, needs, extra, extra_index)
    face = _face(x, dims)
    if face is None:
        found = reference_gradients(grad, x, params, dims, extra, extra_index)
        for buffer, value, needed in zip(buffers, found, needs, strict=True):
            if needed and value is not None:
                buffer.copy_(value)
        return buffers
    grad_x, grad_extra, grad_params = (
        buffer if needed else None for buffer, needed in zip(buffers, needs, strict=True)
    )
    face.call(
        "fused_mlp_backward",
        x,
        *(grad, grad.stride(0), grad.stride(1), x, x.stride(0), x.stride(1)),
        *(*_extra_arguments(x, extra, extra_index), params.contiguous(), c_dims(dims), len(dims) - 1, x.shape[0]),
        *(
            grad_x,
            buffers[0].stride(0),
            buffers[0].stride(-1),
            grad_extra,
            grad_params,
            *_scratch(face, x, dims, extra),
        ),
    )
    return buffers


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    params: torch.Tensor,
    dims: list[int],
    needs: list[bool],
    extra: torch.Tensor | None,
    extra_index: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    needs_x, needs_extra, needs_params = needs
    grad_x = empty_like_layout(x) if needs_x else x.new_empty((0,))
    grad_extra = x.new_empty(extra.shape if needs_extra and extra is not None else (0,))
    return grad_x, grad_extra, params.new_empty(params.shape if needs_params else (0,))


def _refuse_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise BackendError("fused_mlp is differentiable once; use ops.reference.fused_mlp for second derivatives")


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, params, ctx.dims, extra, extra_index = inputs
    ctx.save_for_backward(x, params, extra, extra_index)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, params, extra, extra_index = ctx.saved_tensors
    needs_x, needs_params, _, needs_extra, _ = ctx.needs_input_grad
    needs = [needs_x, needs_extra, needs_params]
    found = fused_mlp_backward(grad, x, params, ctx.dims, needs, extra, extra_index)
    grad_x, grad_extra, grad_params = (value if needed else None for value, needed in zip(found, needs, strict=True))
    return grad_x, grad_params, None, grad_extra, None


_EXTRA = "Tensor? extra, Tensor? extra_index"
fused_mlp_backward = define_op(
    f"fused_mlp_backward(Tensor grad, Tensor x, Tensor params, int[] dims, bool[] needs, {_EXTRA})"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    backward=_refuse_second_derivative,
)
fused_mlp_forward = define_op(
    f"fused_mlp(Tensor x, Tensor params, int[] dims, {_EXTRA}) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_save_inputs,
    backward=_differentiate,
)
