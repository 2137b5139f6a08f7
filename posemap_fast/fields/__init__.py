"""Radiance fields: hash-grid backbones behind one protocol, and NeRF-P (colour, density and pose branch)."""

from posemap_fast.fields import native, reference, tcnn  # registration
from posemap_fast.fields.appearance import AppearanceEncoder, luminance_histogram
from posemap_fast.fields.decoder import PoseDecoder
from posemap_fast.fields.hash_field import HashField
from posemap_fast.fields.nerfp import NeRFP
from posemap_fast.fields.protocol import FIELD_BACKBONES, Field, FieldConfig, FieldFeatures
from posemap_fast.fields.transient import TransientHead

__all__ = [
    "FIELD_BACKBONES",
    "AppearanceEncoder",
    "Field",
    "FieldConfig",
    "FieldFeatures",
    "HashField",
    "NeRFP",
    "PoseDecoder",
    "TransientHead",
    "luminance_histogram",
    "native",
    "reference",
    "tcnn",
]
