"""Density and colour of samples from their encoding: both networks of a radiance field in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.errors import BackendError, ConfigError
from posemap_fast.ops._faces import Face, face_of
from posemap_fast.ops._memory import empty
from posemap_fast.ops._register import define_op
from posemap_fast.ops.fused_mlp import MLPSpec, c_dims, empty_like_layout, fused_mlp_backward, fused_mlp_forward

__all__ = ["RadianceSpec", "fused_radiance"]

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class RadianceSpec:
    """The two networks and the activation of the density.

    Raises:
        ConfigError: the colour network takes fewer inputs than the density network gives, or has no 3 outputs.
    """

    density: MLPSpec  # encoding -> geo, of which geo_0 is the log density
    colour: MLPSpec  # [geo, view] -> 3
    bias: float = 0.0  # added to the log density
    max_log_density: float = 12.0  # the log density is cut off here, and so is its gradient

    def __post_init__(self) -> None:
        if self.n_view < 1 or self.colour.dims[-1] != 3:
            raise ConfigError(
                f"RadianceSpec: colour must map geo ({self.density.dims[-1]} wide) and at least one feature of the ray "
                f"to 3 values; got dims {self.colour.dims}"
            )

    @property
    def n_view(self) -> int:
        """Features of a ray."""
        return self.colour.dims[0] - self.density.dims[-1]


def fused_radiance(
    x: torch.Tensor,
    density_params: torch.Tensor,
    colour_params: torch.Tensor,
    view: torch.Tensor,
    ray_indices: torch.Tensor,
    spec: RadianceSpec,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Density, colour and geometry features of packed samples.

        geo = density(x),   sigma = exp(min(geo_0 + bias, max)),   rgb = sigmoid(colour([geo, view_ray]))

    Convention: parameters as in `fused_mlp`. NaN stays in its sample.
    Args:
        x: (n, d) float32/64 encoding of the samples; any strides, read in place.
        density_params, colour_params: (n_params,) of the two networks, same dtype and device.
        view: (n_rays, n_view) features of the rays: encoded direction, appearance. Same dtype.
        ray_indices: (n,) int64, sorted, in [0, n_rays).
        spec: widths and activation.
    Returns:
        sigmas (n,), rgb (n, 3), geo (n, n_geo), row-major.
    Raises:
        ShapeError: shape, dtype or device do not fit.
        BackendError: a second derivative is asked for, or `ray_indices` is not sorted or out of range.
    Differentiable once in x, view and both parameter vectors, through every output; what nobody needs is not computed.
    Cost: against `fused_mlp` twice, geo and its gradient do not travel through memory between the networks. A GPU and
    the reference compose it of `fused_mlp`. On the CPU bitwise the same for any number of threads.
    Reference: `ops.reference.fused_radiance`.
    """
    expect_dtype("fused_radiance", "x", x, (torch.float32, torch.float64))
    expect_shape("fused_radiance", "x", x, (None, spec.density.dims[0]))
    expect_shape("fused_radiance", "density_params", density_params, (spec.density.n_params,))
    expect_shape("fused_radiance", "colour_params", colour_params, (spec.colour.n_params,))
    expect_shape("fused_radiance", "view", view, (None, spec.n_view))
    for name, tensor in (("density_params", density_params), ("colour_params", colour_params), ("view", view)):
        expect_dtype("fused_radiance", name, tensor, (x.dtype,))
    expect_dtype("fused_radiance", "ray_indices", ray_indices, (torch.int64,))
    expect_shape("fused_radiance", "ray_indices", ray_indices, (len(x),))
    expect_same_device("fused_radiance", x=x, density_params=density_params, view=view, ray_indices=ray_indices)
    dims = list(spec.density.dims), list(spec.colour.dims)
    return _op(x, density_params, dims[0], view, ray_indices, colour_params, dims[1], spec.bias, spec.max_log_density)


def _cpu_face(x: torch.Tensor) -> Face | None:
    face = face_of(x)
    return face if face is not None and face.device == "cpu" else None


def _inputs(
    x: torch.Tensor,
    density_params: torch.Tensor,
    density_dims: list[int],
    view: torch.Tensor,
    ray_indices: torch.Tensor,
    colour_params: torch.Tensor,
    colour_dims: list[int],
    bias: float,
    max_log_density: float,
) -> tuple[object, ...]:
    """The inputs as the C functions take them."""
    return (
        *(x, x.stride(0), x.stride(1), view.contiguous(), view.shape[1], ray_indices.contiguous(), len(view)),
        *(density_params.contiguous(), c_dims(density_dims), len(density_dims) - 1),
        *(colour_params.contiguous(), c_dims(colour_dims), len(colour_dims) - 1),
        *(bias, max_log_density, len(x)),
    )


def _forward(
    x: torch.Tensor,
    density_params: torch.Tensor,
    density_dims: list[int],
    view: torch.Tensor,
    ray_indices: torch.Tensor,
    colour_params: torch.Tensor,
    colour_dims: list[int],
    bias: float,
    max_log_density: float,
) -> Tensors:
    inputs = (x, density_params, density_dims, view, ray_indices, colour_params, colour_dims, bias, max_log_density)
    face = _cpu_face(x)
    if face is not None:
        outputs = _forward_fake(*inputs)
        face.call("fused_radiance", x, *_inputs(*inputs), *outputs)
        return outputs
    with torch.no_grad():
        geo = fused_mlp_forward(x, density_params, density_dims, None, None)
        rgb = torch.sigmoid(fused_mlp_forward(geo, colour_params, colour_dims, view, ray_indices))
        return torch.exp((geo[:, 0] + bias).clamp(max=max_log_density)), rgb, geo


def _forward_fake(x: torch.Tensor, density_params: torch.Tensor, density_dims: list[int], *_: Any) -> Tensors:
    n = x.shape[0]
    return empty(x, n), empty(x, n, 3), empty(x, n, density_dims[-1])


def _backward(
    grad_sigmas: torch.Tensor,
    grad_rgb: torch.Tensor,
    grad_geo: torch.Tensor | None,
    sigmas: torch.Tensor,
    rgb: torch.Tensor,
    geo: torch.Tensor,
    x: torch.Tensor,
    density_params: torch.Tensor,
    density_dims: list[int],
    view: torch.Tensor,
    ray_indices: torch.Tensor,
    colour_params: torch.Tensor,
    colour_dims: list[int],
    bias: float,
    max_log_density: float,
    needs: list[bool],
) -> Tensors:
    """Gradients of x, view and both parameter vectors; one that is not in `needs` is an empty tensor."""
    inputs = (x, density_params, density_dims, view, ray_indices, colour_params, colour_dims, bias, max_log_density)
    face = _cpu_face(x)
    if face is not None:
        grads = _empty_grads(x, view, density_params, colour_params, needs)
        to_x, *others = (grad if need else None for grad, need in zip(grads, needs, strict=True))
        strides = (grads[0].stride(0), grads[0].stride(-1))
        given = [None if g is None else g.contiguous() for g in (grad_sigmas, grad_rgb, grad_geo)]
        face.call("fused_radiance_backward", x, *given, *_inputs(*inputs), sigmas, rgb, geo, to_x, *strides, *others)
        return grads
    needs_x, needs_view, needs_density, needs_colour = needs
    with torch.no_grad():
        to_geo, to_view, to_colour = fused_mlp_backward(
            grad_rgb * rgb * (1 - rgb),
            geo,
            colour_params,
            colour_dims,
            [True, needs_view, needs_colour],
            view,
            ray_indices,
        )
        to_geo[:, 0] += torch.where(geo[:, 0] + bias <= max_log_density, grad_sigmas * sigmas, 0)
        if grad_geo is not None:
            to_geo += grad_geo
        wanted = [needs_x, False, needs_density]
        to_x, _, to_density = fused_mlp_backward(to_geo, x, density_params, density_dims, wanted, None, None)
    return to_x, to_view, to_density, to_colour


def _empty_grads(
    x: torch.Tensor, view: torch.Tensor, density_params: torch.Tensor, colour_params: torch.Tensor, needs: list[bool]
) -> Tensors:
    needs_x, *others = needs
    vectors = zip((view, density_params, colour_params), others, strict=True)
    return (
        empty_like_layout(x) if needs_x else x.new_empty(0),
        *(t.new_empty(t.shape if need else (0,)) for t, need in vectors),
    )


def _backward_fake(*arguments: Any) -> Tensors:
    x, density_params, _, view, _, colour_params = arguments[6:12]
    return _empty_grads(x, view, density_params, colour_params, arguments[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    x, density_params, ctx.density_dims, view, ray_indices, colour_params, ctx.colour_dims, *ctx.activation = inputs
    ctx.save_for_backward(x, density_params, view, ray_indices, colour_params, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if all(c is None for c in cotangents):
        return (None,) * 9
    x, density_params, view, ray_indices, colour_params, sigmas, rgb, geo = ctx.saved_tensors
    grad_sigmas, grad_rgb, grad_geo = cotangents
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 3, 1, 5)]  # x, view, density_params, colour_params
    found = _op_backward(
        torch.zeros_like(sigmas) if grad_sigmas is None else grad_sigmas,
        torch.zeros_like(rgb) if grad_rgb is None else grad_rgb,
        *(grad_geo, sigmas, rgb, geo, x, density_params, ctx.density_dims),
        *(view, ray_indices, colour_params, ctx.colour_dims, *ctx.activation, needs),
    )
    grads = (grad if need else None for grad, need in zip(found, needs, strict=True))
    to_x, to_view, to_density, to_colour = grads
    return to_x, to_density, None, to_view, None, to_colour, None, None, None


def _refuse_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise BackendError("fused_radiance is differentiable once; use ops.reference.fused_radiance for more")


_INPUTS = (
    "Tensor x, Tensor density_params, int[] density_dims, Tensor view, Tensor ray_indices, Tensor colour_params, "
    "int[] colour_dims, float bias, float max_log_density"
)
_op_backward = define_op(
    "fused_radiance_backward(Tensor grad_sigmas, Tensor grad_rgb, Tensor? grad_geo, Tensor sigmas, Tensor rgb, "
    f"Tensor geo, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    backward=_refuse_second_derivative,
)
_op = define_op(
    f"fused_radiance({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
