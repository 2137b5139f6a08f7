"""Compositing of packed samples: colour, depth, opacity and any number of feature channels in one pass.

Native code: `cuda_ext/composite`. Oracle and fallback: `posemap_fast.ops.reference.composite`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.errors import BackendError, ShapeError
from posemap_fast.ops._faces import face_of
from posemap_fast.ops._memory import empty
from posemap_fast.ops._register import define_op
from posemap_fast.ops.reference import composite as reference

__all__ = ["CompositeOutput", "check_ray_offsets", "check_samples", "composite"]

FLOATS = (torch.float32, torch.float64)
Tensors = tuple[torch.Tensor, ...]


class CompositeOutput(NamedTuple):
    """What light carries to the camera; n rays, m samples, C feature channels."""

    rgb: torch.Tensor  # (n, 3), without background
    depth: torch.Tensor  # (n,) sum of weight * mid-distance along the ray; not divided by the opacity
    opacity: torch.Tensor  # (n,) sum of weights, in [0, 1]
    features: torch.Tensor  # (n, C)
    weights: torch.Tensor  # (m,)


def composite(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    ray_offsets: torch.Tensor,
    features: torch.Tensor | None = None,
    early_stop_eps: float = 1e-4,
) -> CompositeOutput:
    """Weights of packed samples along each ray, and what they sum to (Eq. 3, Mildenhall et al. 2020, arXiv:2003.08934).

        w_i = T_i (1 - exp(-sigma_i (t_end_i - t_start_i))),   T_i = exp(-sum_{j<i} sigma_j (t_end_j - t_start_j))

    Convention: the samples of ray r are ray_offsets[r] .. ray_offsets[r + 1] - 1, sorted by t; T_i is before sample i.
    A sample with T_i < early_stop_eps has weight 0, so have all behind it, and they get no gradient.
    Args:
        sigmas: (m,) float32/64, density per unit of t, >= 0.
        t_starts, t_ends: (m,) same dtype, distance along unit-length rays (field units in the renderer).
        rgbs: (m, 3) same dtype.
        ray_offsets: (n + 1,) int64 from 0 to m, not decreasing; a ray may have no sample and then gives zeros.
        features: (m, C) same dtype, any C; rows may be strided, columns are copied if they are. None is C = 0.
        early_stop_eps: transmittance in [0, 1); 0 composites every sample.
    Returns:
        CompositeOutput. A NaN stays on its ray.
    Raises:
        ShapeError: shapes, dtypes or devices do not agree, or ray_offsets is not from 0 to m without decrease.
    Differentiable (once) in sigmas, t_starts, t_ends, rgbs and features, through every output; what is not needed is
    not computed. Cost: features are read once, and in backward read once and their gradient written once.
    Reference: `ops.reference.composite`.
    Example: sigmas = [0, ln 2], t_ends - t_starts = 1  ->  weights [0, 0.5]
    """
    check_samples("composite", sigmas, t_starts, t_ends, ray_offsets)
    expect_shape("composite", "rgbs", rgbs, (len(sigmas), 3))
    expect_dtype("composite", "rgbs", rgbs, (sigmas.dtype,))
    if features is None:
        features = sigmas.new_empty(len(sigmas), 0)
    expect_shape("composite", "features", features, (len(sigmas), None))
    expect_dtype("composite", "features", features, (sigmas.dtype,))
    expect_same_device("composite", sigmas=sigmas, rgbs=rgbs, features=features)
    outputs = _composite_op(sigmas, t_starts, t_ends, rgbs, features, ray_offsets, float(early_stop_eps))
    return CompositeOutput(*outputs)


def check_samples(
    where: str, sigmas: torch.Tensor, t_starts: torch.Tensor, t_ends: torch.Tensor, ray_offsets: torch.Tensor
) -> None:
    """Raise `ShapeError` unless these are m packed samples of one float dtype on one device with int64 offsets."""
    expect_shape(where, "sigmas", sigmas, (None,))
    expect_dtype(where, "sigmas", sigmas, FLOATS)
    for name, tensor in (("t_starts", t_starts), ("t_ends", t_ends)):
        expect_shape(where, name, tensor, (len(sigmas),))
        expect_dtype(where, name, tensor, (sigmas.dtype,))
    expect_shape(where, "ray_offsets", ray_offsets, (None,))
    expect_dtype(where, "ray_offsets", ray_offsets, (torch.int64,))
    expect_same_device(where, sigmas=sigmas, t_starts=t_starts, t_ends=t_ends, ray_offsets=ray_offsets)


def check_ray_offsets(where: str, ray_offsets: torch.Tensor, n_samples: int) -> None:
    """Raise `ShapeError` unless `ray_offsets` runs from 0 to `n_samples` without decrease.

    Looks at values, so it belongs inside an op, where tracing does not come. On a GPU the values are taken on trust:
    to look at them, every call would have to wait for the device.
    """
    if len(ray_offsets) == 0:
        raise ShapeError(f"{where}: ray_offsets must have n_rays + 1 entries; got none")
    if ray_offsets.device.type != "cpu":
        return
    first, last = int(ray_offsets[0]), int(ray_offsets[-1])
    if first != 0 or last != n_samples:
        raise ShapeError(f"{where}: ray_offsets must run from 0 to {n_samples} samples; got {first} to {last}")
    if bool((ray_offsets[1:] < ray_offsets[:-1]).any()):
        raise ShapeError(f"{where}: ray_offsets must not decrease; did you pass counts instead of their running sum?")


def _strided_rows(features: torch.Tensor) -> torch.Tensor:
    """`features` itself if each row is contiguous, else a contiguous copy."""
    return features if features.shape[1] <= 1 or features.stride(1) == 1 else features.contiguous()


def _row_stride(features: torch.Tensor) -> int:
    return features.stride(0) if len(features) > 1 else features.shape[1]


def _composite(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
    early_stop_eps: float,
) -> Tensors:
    check_ray_offsets("composite", ray_offsets, len(sigmas))
    face = face_of(sigmas)
    if face is None:
        return reference.composite(sigmas, t_starts, t_ends, rgbs, features, ray_offsets, early_stop_eps)
    n_rays, (n_samples, n_channels) = len(ray_offsets) - 1, features.shape
    outputs = _composite_fake(sigmas, t_starts, t_ends, rgbs, features, ray_offsets, early_stop_eps)
    rows = _strided_rows(features)
    inputs = [t.contiguous() for t in (sigmas, t_starts, t_ends, rgbs)]
    sizes = (n_rays, n_samples, n_channels, _row_stride(rows))
    face.call("composite", sigmas, *inputs, rows, ray_offsets.contiguous(), *outputs, *sizes, early_stop_eps)
    return outputs


def _composite_fake(
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
    early_stop_eps: float,
) -> Tensors:
    n_rays, new = ray_offsets.shape[0] - 1, functools.partial(empty, sigmas)
    return new(n_rays, 3), new(n_rays), new(n_rays), new(n_rays, features.shape[1]), new(sigmas.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *tensors, ctx.early_stop_eps = inputs
    ctx.save_for_backward(*tensors, output[4])
    ctx.set_materialize_grads(False)  # an output that no loss reads costs nothing


def _autograd(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    # Colours and features matter to the loss through the output that sums them only.
    needs[3] = needs[3] and cotangents[0] is not None
    needs[4] = needs[4] and cotangents[3] is not None
    if all(c is None for c in cotangents) or not any(needs):
        return (None,) * 7
    grads = _backward_op(*cotangents, *ctx.saved_tensors, ctx.early_stop_eps, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None


def _backward(
    grad_rgb: torch.Tensor | None,
    grad_depth: torch.Tensor | None,
    grad_opacity: torch.Tensor | None,
    grad_features: torch.Tensor | None,
    grad_weights: torch.Tensor | None,
    sigmas: torch.Tensor,
    t_starts: torch.Tensor,
    t_ends: torch.Tensor,
    rgbs: torch.Tensor,
    features: torch.Tensor,
    ray_offsets: torch.Tensor,
    weights: torch.Tensor,
    early_stop_eps: float,
    needs: list[bool],
) -> Tensors:
    cotangents = (grad_rgb, grad_depth, grad_opacity, grad_features, grad_weights)
    inputs = (sigmas, t_starts, t_ends, rgbs, features)
    face = face_of(sigmas)
    if face is None:
        found = reference.composite_backward(cotangents, *inputs, ray_offsets, early_stop_eps)
        return tuple(g if need else g.new_empty(0) for g, need in zip(found, needs, strict=True))
    grads = _empty_grads(inputs, needs)
    wanted: list[torch.Tensor | None] = [g if need else None for g, need in zip(grads, needs, strict=True)]
    if any(needs[:3]) and wanted[0] is None:
        wanted[0] = torch.empty_like(sigmas, memory_format=torch.contiguous_format)  # the kernel works in it
    rows = _strided_rows(features)
    given = [None if c is None else c.contiguous() for c in cotangents]
    scalars = [t.contiguous() for t in inputs[:4]]
    sizes = (len(ray_offsets) - 1, *features.shape, _row_stride(rows))
    fixed = (*scalars, rows, ray_offsets.contiguous(), weights)
    face.call("composite_backward", sigmas, *fixed, *given, *wanted, *sizes, early_stop_eps)
    return grads


def _empty_grads(inputs: Tensors, needs: list[bool]) -> Tensors:
    """One tensor per input: of its shape if its gradient is wanted, else of no elements."""
    return tuple(empty(t, *(t.shape if need else (0,))) for t, need in zip(inputs, needs, strict=True))


def _backward_fake(*arguments: Any) -> Tensors:
    return _empty_grads(arguments[5:10], arguments[13])


def _refuse_second_derivative(ctx: Any, *cotangents: torch.Tensor | None) -> None:
    raise BackendError("composite: it is differentiable once; its gradient has no derivative (drop create_graph=True)")


_composite_op = define_op(
    "composite(Tensor sigmas, Tensor t_starts, Tensor t_ends, Tensor rgbs, Tensor features, Tensor ray_offsets, "
    "float early_stop_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _composite,
    _composite_fake,
    setup_context=_setup_context,
    backward=_autograd,
)
_backward_op = define_op(
    "composite_backward(Tensor? grad_rgb, Tensor? grad_depth, Tensor? grad_opacity, Tensor? grad_features, "
    "Tensor? grad_weights, Tensor sigmas, Tensor t_starts, Tensor t_ends, Tensor rgbs, Tensor features, "
    "Tensor ray_offsets, Tensor weights, float early_stop_eps, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    backward=_refuse_second_derivative,
)
