"""`native`: the hash field on this package's own kernels (posemap_fast.ops)."""

from __future__ import annotations

from posemap_fast.fields.hash_field import FieldFunctions, HashField
from posemap_fast.fields.protocol import FIELD_BACKBONES, FieldConfig
from posemap_fast.ops import fused_mlp, fused_radiance, hash_encode, sh_encode

__all__ = ["build_native"]


@FIELD_BACKBONES.register("native")
def build_native(config: FieldConfig) -> HashField:
    """Field on the registered ops: native code on the CPU, the reference where none is available."""
    return HashField(config, FieldFunctions(hash_encode, sh_encode, fused_mlp, fused_radiance, fuses=True))
