"""`reference`: the hash field in plain torch; slow, float64-capable, the oracle of the other backbones."""

from __future__ import annotations

import torch

from posemap_fast.fields.hash_field import FieldFunctions, HashField
from posemap_fast.fields.protocol import FIELD_BACKBONES, FieldConfig
from posemap_fast.ops import MLPSpec
from posemap_fast.ops.reference.fused_mlp import fused_mlp
from posemap_fast.ops.reference.hash_encode import hash_encode
from posemap_fast.ops.reference.sh_encode import sh_encode

__all__ = ["build_reference"]


@FIELD_BACKBONES.register("reference")
def build_reference(config: FieldConfig) -> HashField:
    """Field whose every operation is a plain torch expression with ordinary autograd."""
    return HashField(config, FieldFunctions(hash_encode, sh_encode, _mlp))


def _mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    spec: MLPSpec,
    extra: torch.Tensor | None = None,
    extra_index: torch.Tensor | None = None,
) -> torch.Tensor:
    return fused_mlp(x, params, spec.dims, extra, extra_index)
