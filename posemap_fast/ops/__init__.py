"""Numerical kernels: public wrappers around the registered ops; `ops.reference` holds the plain torch oracles."""

from posemap_fast.ops._library import backend_name, use_backend
from posemap_fast.ops.compact import CompactResult, compact
from posemap_fast.ops.composite import CompositeOutput, composite
from posemap_fast.ops.fused_mlp import MLPSpec, fused_mlp
from posemap_fast.ops.fused_radiance import RadianceSpec, fused_radiance
from posemap_fast.ops.fused_render import FusedField, fused_render, fused_render_fits
from posemap_fast.ops.hash_encode import HashGridSpec, hash_encode
from posemap_fast.ops.march import MarchResult, MarchSpec, march, pack_bits
from posemap_fast.ops.sh_encode import sh_encode

__all__ = [
    "CompactResult",
    "CompositeOutput",
    "FusedField",
    "HashGridSpec",
    "MLPSpec",
    "MarchResult",
    "MarchSpec",
    "RadianceSpec",
    "backend_name",
    "compact",
    "composite",
    "fused_mlp",
    "fused_radiance",
    "fused_render",
    "fused_render_fits",
    "hash_encode",
    "march",
    "pack_bits",
    "sh_encode",
    "use_backend",
]
