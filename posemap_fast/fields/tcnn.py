"""`tcnn`: the hash field on tiny-cuda-nn's grid and fused networks (Müller et al. 2021 and 2022); CUDA only.

Only two of the four functions of `HashField` are replaced, so parameters, their names and their meaning are those of
every other backbone: this package keeps the float32 parameters, and each call hands tiny-cuda-nn a view or a padded
copy of them in its own layout (`tcnn_layout`). Inside it is half precision, outside float32.

Gradients: tiny-cuda-nn multiplies what it gets by its `loss_scale` (128), but only after it is in half precision,
where a loss that is a mean over many samples has lost its small parts. So the gradient is brought to a fixed size
in float32 first, and the results divided by the same power of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from posemap_fast.checks import expect_dtype, expect_shape
from posemap_fast.errors import BackendError
from posemap_fast.fields.hash_field import FieldFunctions, HashField
from posemap_fast.fields.protocol import FIELD_BACKBONES, FieldConfig
from posemap_fast.fields.tcnn_layout import (
    encoding_config,
    n_tcnn_params,
    network_config,
    to_tcnn_params,
    to_tcnn_table,
)
from posemap_fast.ops import HashGridSpec, MLPSpec, sh_encode
from posemap_fast.ops.reference.fused_mlp import joined_input
from posemap_fast.ops.reference.hash_encode import clamped_positions
from posemap_fast.optional import TINYCUDANN

__all__ = ["TcnnFunctions", "build_on", "build_tcnn"]

# Largest column sum of |gradient| that enters tiny-cuda-nn. Its 128-fold, summed over the batch with activations of
# up to 32, still fits a half (65504); a mean element of 2^18 samples is 6e-5, a thousand times the smallest half.
_GRADIENT_SIZE = 16.0


@FIELD_BACKBONES.register("tcnn")
def build_tcnn(config: FieldConfig) -> HashField:
    """Field on tiny-cuda-nn.

    Raises:
        BackendError: no CUDA device, or tinycudann is not installed (the message has the install line).
    """
    return build_on(TINYCUDANN.load(), config)


def build_on(tinycudann: Any, config: FieldConfig) -> HashField:
    """Field on the given module: `Encoding` and `Network` of it are used, as tiny-cuda-nn's bindings document them.

    Raises:
        BackendError: the module refuses these sizes, or keeps another number of parameters.
    """
    functions = TcnnFunctions(tinycudann)
    field = HashField(config, FieldFunctions(functions.hash_encode, sh_encode, functions.fused_mlp))
    networks = [field.density_mlp, field.colour_mlp, *([field.pose_mlp] if field.pose_mlp else [])]
    functions.prepare(field.grid, *networks)
    return field


class TcnnFunctions:
    """`hash_encode` and `fused_mlp` with the contracts of `ops`, float32 only, one module per shape."""

    def __init__(self, tinycudann: Any):
        self._encoding, self._network = tinycudann.Encoding, tinycudann.Network
        self._modules: dict[HashGridSpec | MLPSpec, nn.Module] = {}

    def prepare(self, *specs: HashGridSpec | MLPSpec) -> None:
        """Create the modules now, so that what tiny-cuda-nn refuses is said when the field is built."""
        for spec in specs:
            self._module(spec)

    def hash_encode(self, x: torch.Tensor, table: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
        """As `ops.hash_encode`: clamped positions, NaN as 0, gradients to both."""
        expect_shape("tcnn", "table", table, (spec.n_entries, spec.n_features_per_level))
        unit = clamped_positions(x)  # tiny-cuda-nn wraps around outside the cube
        return self._call(spec, unit, to_tcnn_table(table), spec.output_dim)

    def fused_mlp(
        self,
        x: torch.Tensor,
        params: torch.Tensor,
        spec: MLPSpec,
        extra: torch.Tensor | None = None,
        extra_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `ops.fused_mlp`; the parts of the input are joined by a copy."""
        rows = joined_input(x, extra, extra_index)
        expect_shape("tcnn", "x and extra", rows, (None, spec.dims[0]))
        return self._call(spec, rows, to_tcnn_params(params, spec), spec.dims[-1])

    def _call(self, spec: HashGridSpec | MLPSpec, x: torch.Tensor, flat: torch.Tensor, width: int) -> torch.Tensor:
        module = self._module(spec)
        expect_dtype("tcnn", "x", x, (torch.float32,))
        home = module.params.device
        if x.device != home or flat.device != home:
            raise BackendError(
                f"tcnn computes on {home}; got inputs on {x.device} and parameters on {flat.device}: "
                "move field and rays there, or set field.backbone=native"
            )
        if len(x) == 0:  # its backward divides by the batch size; the sums keep the graph whole, with zero gradients
            return x.new_zeros(0, width) * (x.sum() + flat.sum())
        scale = _Scale()
        inputs = _Divide.apply(x, scale)
        out = functional_call(module, {"params": _Divide.apply(flat, scale)}, (inputs,))
        return _ToFloat.apply(out, scale)

    def _module(self, spec: HashGridSpec | MLPSpec) -> nn.Module:
        if spec not in self._modules:
            self._modules[spec] = self._create(spec)
        return self._modules[spec]

    def _create(self, spec: HashGridSpec | MLPSpec) -> nn.Module:
        try:
            if isinstance(spec, HashGridSpec):
                module, expected = self._encoding(3, encoding_config(spec)), spec.n_entries * spec.n_features_per_level
            else:
                module = self._network(spec.dims[0], spec.dims[-1], network_config(spec))
                expected = n_tcnn_params(spec)
        except RuntimeError as error:
            raise BackendError(f"tinycudann refuses {spec}: {error}") from error
        if module.params.numel() != expected:
            raise BackendError(
                f"tinycudann keeps {module.params.numel()} parameters for {spec}, "
                f"its documented layout has {expected}; this version of it cannot be used, set field.backbone=native"
            )
        # The parameters are handed over with each call; its own would only take memory.
        module.params = nn.Parameter(module.params.new_empty(0), requires_grad=False)
        return module


class _Scale:
    """Power of two by which the gradient of one call is multiplied; set on its way in, used on its way out."""

    value: torch.Tensor


def gradient_scale(grad: torch.Tensor) -> torch.Tensor:
    """Power of two that brings the largest column sum of |grad| (n, width) to at most `_GRADIENT_SIZE`; no sync."""
    size = grad.abs().sum(0).amax().clamp(min=1e-30)
    return torch.where(size.isfinite(), torch.exp2((_GRADIENT_SIZE / size).log2().floor()), 1.0)


class _ToFloat(torch.autograd.Function):
    """Half output -> float32; the gradient is multiplied before it becomes half."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, scale: _Scale) -> torch.Tensor:
        ctx.scale, ctx.dtype = scale, out.dtype
        return out.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.scale.value = gradient_scale(grad)
        return (grad * ctx.scale.value).to(ctx.dtype), None


class _Divide(torch.autograd.Function):
    """The identity on an input; its gradient is divided by what the output's was multiplied by."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: _Scale) -> torch.Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad / ctx.scale.value, None
