"""How this package's hash grid and networks look to tiny-cuda-nn: configs, flat parameters, padding. Torch only.

What tiny-cuda-nn does is read from its sources (v2.0, 6ee3546), below `include/tiny-cuda-nn` unless said otherwise:

- `encodings/grid.h`, `common_device.h`: levels lie one after the other, each min(next_multiple(resolution^3, 8), 2^T)
  rows of F features; scale = exp2(level * log2(per_level_scale)) * base - 1 and resolution = ceil(scale) + 1, all in
  float32; x runs fastest in dense levels, others hash with CoherentPrime. That is `HashGridSpec`, so the flat vector
  is the table itself, provided that per_level_scale makes its float32 arithmetic arrive at our resolutions.
- `src/fully_fused_mlp.cu`, `src/cutlass_mlp.cu`: weight matrices one after the other, row-major (out, in), no biases;
  all hidden layers have one width, the last matrix has a multiple of 16 rows.
- `network_with_input_encoding.h`, `encodings/identity.h`: the input is widened to a multiple of 16 **with ones**, so
  the added columns would be biases; here they are zero, and so is their gradient, because it is cut off.
- `bindings/torch/tinycudann/modules.py`: pads the batch to a multiple of 256 and cuts the outputs by itself.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch.nn import functional as F

from posemap_fast.errors import BackendError
from posemap_fast.ops import HashGridSpec, MLPSpec

__all__ = [
    "encoding_config",
    "from_tcnn_params",
    "from_tcnn_table",
    "grid_resolutions",
    "n_tcnn_params",
    "network_config",
    "padded_dims",
    "per_level_scale",
    "to_tcnn_params",
    "to_tcnn_table",
]

_ALIGNMENT = 16  # FullyFusedMLP and CutlassMLP: REQUIRED_ALIGNMENT(), of inputs and outputs
_FUSED_WIDTHS = (16, 32, 64, 128)  # hidden widths that FullyFusedMLP is compiled for
_EXP2_ERROR = 2.0**-21  # relative; the GPU's exp2 is an approximation unless the exponent is a whole number
_MAX_NUDGE = 64  # float32 steps that the growth factor may be moved by: less than 1e-5 of it


def next_multiple(value: int, factor: int) -> int:
    """The smallest multiple of `factor` that is not below `value`."""
    return -(-value // factor) * factor


def _single(value: float) -> float:
    """Rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def grid_resolutions(growth: float, spec: HashGridSpec, error: float = 0.0) -> list[int]:
    """Resolution of each level as tiny-cuda-nn's float32 arithmetic gives it for per_level_scale = `growth`.

    Args:
        error: relative error of exp2, which is assumed exact where the exponent is a whole number.
    """
    log2_growth = _single(math.log2(_single(growth)))
    resolutions = []
    for level in range(spec.n_levels):
        exponent = _single(level * log2_growth)
        power = _single(2.0**exponent * (1.0 if exponent.is_integer() else 1.0 + error))
        resolutions.append(math.ceil(_single(_single(power * spec.base_resolution) - 1.0)) + 1)
    return resolutions


def _is_faithful(growth: float, spec: HashGridSpec) -> bool:
    """Whether every level that is not hashed has our resolution, whatever the GPU's exp2 rounds to."""
    n_rows = [end - begin for begin, end in itertools.pairwise(spec.level_offsets)]
    for error in (-_EXP2_ERROR, 0.0, _EXP2_ERROR):
        found = grid_resolutions(growth, spec, error)
        for ours, theirs, rows in zip(spec.resolutions, found, n_rows, strict=True):
            if ours != theirs and min(ours, theirs) ** 3 <= rows:
                return False
    return True


def per_level_scale(spec: HashGridSpec) -> float:
    """Growth factor between levels for tiny-cuda-nn: ours, moved by as few float32 steps as make the layouts agree.

    A level whose scale is a whole number, 31 say, would become 31.000002 by rounding and get another resolution, and
    with it other strides and another number of rows; a growth factor a little smaller keeps it at 30.99999.

    Raises:
        BackendError: no growth factor near ours gives the same levels.
    """
    steps = max(spec.n_levels - 1, 1)
    growth = _single((spec.finest_resolution / spec.base_resolution) ** (1 / steps))
    below = above = torch.tensor(growth, dtype=torch.float32)
    for _ in range(_MAX_NUDGE):
        for candidate in (float(below), float(above)):
            if _is_faithful(candidate, spec):
                return candidate
        below = torch.nextafter(below, torch.zeros_like(below))
        above = torch.nextafter(above, torch.full_like(above, torch.inf))
    raise BackendError(
        f"tcnn: no per_level_scale gives the levels of {spec}; change finest_resolution "
        f"({spec.finest_resolution}) a little, or set field.backbone=native"
    )


def encoding_config(spec: HashGridSpec) -> dict[str, Any]:
    """The encoding dictionary of tiny-cuda-nn for this grid (DOCUMENTATION.md, "Grid")."""
    return {
        "otype": "HashGrid",
        "n_levels": spec.n_levels,
        "n_features_per_level": spec.n_features_per_level,
        "log2_hashmap_size": spec.log2_hashmap_size,
        "base_resolution": spec.base_resolution,
        "per_level_scale": per_level_scale(spec),
        "interpolation": "Linear",
    }


def padded_dims(spec: MLPSpec) -> tuple[int, ...]:
    """Widths of the matrices that tiny-cuda-nn keeps for this network, each a multiple of 16.

    Raises:
        BackendError: no hidden layer, or hidden layers of several widths.
    """
    hidden = set(spec.dims[1:-1])
    if len(hidden) != 1:
        raise BackendError(f"tcnn: a network needs hidden layers of one width; got dims {spec.dims}")
    return tuple(next_multiple(width, _ALIGNMENT) for width in spec.dims)


def network_config(spec: MLPSpec) -> dict[str, Any]:
    """The network dictionary of tiny-cuda-nn (DOCUMENTATION.md, "Networks"): fused where there is a kernel for it."""
    hidden = padded_dims(spec)[1]
    return {
        "otype": "FullyFusedMLP" if hidden in _FUSED_WIDTHS else "CutlassMLP",
        "activation": "ReLU",
        "output_activation": "None",
        "n_neurons": hidden,
        "n_hidden_layers": len(spec.dims) - 2,
    }


def n_tcnn_params(spec: MLPSpec) -> int:
    """Length of tiny-cuda-nn's flat vector for this network."""
    return sum(n_in * n_out for n_in, n_out in itertools.pairwise(padded_dims(spec)))


def to_tcnn_params(params: torch.Tensor, spec: MLPSpec) -> torch.Tensor:
    """Our flat weights (spec.n_params,) -> tiny-cuda-nn's, zeros in all added rows and columns. Differentiable."""
    parts = []
    for weight, (n_in, n_out) in zip(spec.split(params), itertools.pairwise(padded_dims(spec)), strict=True):
        parts.append(F.pad(weight, (0, n_in - weight.shape[1], 0, n_out - weight.shape[0])).flatten())
    return torch.cat(parts)


def from_tcnn_params(flat: torch.Tensor, spec: MLPSpec) -> torch.Tensor:
    """tiny-cuda-nn's flat weights -> ours (spec.n_params,); what stands in added rows and columns is dropped."""
    shapes = [(n_out, n_in) for n_in, n_out in itertools.pairwise(padded_dims(spec))]
    parts = flat.split([n_out * n_in for n_out, n_in in shapes])
    weights = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    kept = zip(weights, spec.layer_shapes, strict=True)
    return torch.cat([weight[:n_out, :n_in].flatten() for weight, (n_out, n_in) in kept])


def to_tcnn_table(table: torch.Tensor) -> torch.Tensor:
    """Our table (n_entries, F) -> tiny-cuda-nn's flat vector: a view, the layouts are one."""
    return table.reshape(-1)


def from_tcnn_table(flat: torch.Tensor, spec: HashGridSpec) -> torch.Tensor:
    """tiny-cuda-nn's flat vector -> our table (n_entries, F)."""
    return flat.view(spec.n_entries, spec.n_features_per_level)
