"""Colour, depth, opacity and PoseMap hidden of rays in one launch, for inference on a GPU.

March, hash encoding, the three networks and compositing run inside one kernel: nothing is written per sample. What it
computes is what `march`, `hash_encode`, `fused_mlp` and `composite` compute one after the other (the renderer's other
path and this one's oracle), with weights and activations rounded to half precision. There is no CPU face.
Native code: `cuda_ext/fused_render`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import NamedTuple

import torch

from posemap_fast.checks import expect_dtype, expect_same_device, expect_shape
from posemap_fast.ops._faces import Face, face_of
from posemap_fast.ops.fused_mlp import MLPSpec
from posemap_fast.ops.hash_encode import HashGridSpec
from posemap_fast.ops.march import MarchSpec

__all__ = ["FusedField", "FusedOutput", "fused_render", "fused_render_fits"]

_WIDTHS = (16, 32, 48, 64)  # hidden widths that the kernel's tiles have
_MOST = 32  # encoded features, and view features (spherical harmonics with appearance)


@dataclass(frozen=True)
class FusedField:
    """A hash field as the kernel reads it; see `fields.hash_field`."""

    grid: HashGridSpec
    table: torch.Tensor  # (grid.n_entries, F) float32 or float16
    density: torch.Tensor  # parameters of the density network, float16
    colour: torch.Tensor
    pose: torch.Tensor | None  # None: no PoseMap
    density_spec: MLPSpec
    colour_spec: MLPSpec
    pose_spec: MLPSpec | None  # of `pose`
    sh_degree: int
    appearance_dim: int
    log_init_density: float
    max_log_density: float


class FusedOutput(NamedTuple):
    """What rays see; n rays."""

    rgb: torch.Tensor  # (n, 3), without background
    depth: torch.Tensor  # (n,) sum of weight * mid-distance, field units
    opacity: torch.Tensor  # (n,)
    hidden: torch.Tensor  # (n, pose width), or (n, 0)


class _Parameters(ctypes.Structure):
    """PmfFusedRender of cuda_ext/fused_render/fused_render.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("origins", "directions", "near", "far", "jitter")),
        ("n_rays", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("aabb", "bits")),
        *((name, ctypes.c_int64) for name in ("resolution", "n_cascades")),
        *((name, ctypes.c_double) for name in ("step_min", "step_max", "cone_angle")),
        ("max_samples", ctypes.c_int64),
        ("table", ctypes.c_void_p),
        ("is_table_half", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("scales", "resolutions", "offsets")),
        *((name, ctypes.c_int64) for name in ("n_levels", "n_features")),
        *((name, ctypes.c_void_p) for name in ("density_weights", "colour_weights", "pose_weights", "appearance")),
        *((name, ctypes.c_int64) for name in ("hidden", "n_geo", "sh_degree", "appearance_dim", "pose_hidden")),
        *((name, ctypes.c_double) for name in ("log_init_density", "max_log_density", "early_stop_eps")),
        *((name, ctypes.c_void_p) for name in ("rgb", "depth", "opacity", "pose", "n_samples")),
    ]


def fused_render_fits(field: FusedField) -> bool:
    """Whether the kernel has tiles for this field's widths."""
    view = field.sh_degree**2 + field.appearance_dim
    return (
        field.grid.output_dim <= _MOST
        and field.grid.n_features_per_level <= 4
        and view <= _MOST
        and len(field.density_spec.dims) == 3
        and field.density_spec.dims[1] in _WIDTHS
        and field.density_spec.dims[2] <= 16
        and field.colour_spec.dims[1:] == (field.density_spec.dims[1], field.density_spec.dims[1], 3)
        and (field.pose_spec is None or _fits_pose(field.pose_spec))
    )


def _fits_pose(spec: MLPSpec) -> bool:
    return spec.dims[1] in _WIDTHS and spec.dims[1:] == (spec.dims[1],) * 2


def _face(origins: torch.Tensor) -> Face | None:
    face = face_of(origins, cuda_dtypes=(torch.float32,))
    return face if face is not None and face.device == "cuda" else None


def fused_render(
    field: FusedField,
    origins: torch.Tensor,
    directions: torch.Tensor,
    near: torch.Tensor,
    far: torch.Tensor,
    aabb: torch.Tensor,
    bitfield: torch.Tensor,
    spec: MarchSpec,
    *,
    appearance: torch.Tensor | None = None,
    early_stop_eps: float = 1e-4,
) -> FusedOutput | None:
    """Render rays in one launch; None where there is no CUDA face for them (use the separate ops there).

    Convention: field frame (the unit cube). No gradient, no wait for the device, fixed shapes: it can be captured in a
    CUDA graph.
    Args:
        field: `fused_render_fits(field)` must hold.
        origins, directions: (n, 3) float32, directions of unit length.
        near, far: (n,) float32.
        aabb: (2, 3) on the CPU.
        bitfield: (spec.n_cells / 8,) uint8.
        spec: occupancy grid and steps.
        appearance: (n, field.appearance_dim) float32, None for zeros.
        early_stop_eps: samples behind this transmittance are left out.
    Raises:
        ShapeError: shape, dtype or device do not fit.
        BackendError: the kernel refuses the sizes, or CUDA reports an error.
    """
    n = len(origins)
    for name, rays, shape in (
        ("origins", origins, (None, 3)),
        ("directions", directions, (n, 3)),
        ("near", near, (n,)),
        ("far", far, (n,)),
    ):
        expect_shape("fused_render", name, rays, shape)
        expect_dtype("fused_render", name, rays, (torch.float32,))
    expect_shape("fused_render", "bitfield", bitfield, (spec.n_cells // 8,))
    if appearance is not None:
        expect_shape("fused_render", "appearance", appearance, (n, field.appearance_dim))
    expect_same_device("fused_render", origins=origins, directions=directions, bitfield=bitfield, table=field.table)
    face = _face(origins)
    if face is None:
        return None
    width = 0 if field.pose_spec is None else field.pose_spec.dims[-1]
    new = origins.new_empty
    output = FusedOutput(new(n, 3), new(n), new(n), new(n, width))
    box = aabb.to("cpu", torch.float64).contiguous()
    inputs = [t.contiguous() for t in (origins, directions, near, far, bitfield, field.table)]
    codes = None if appearance is None or field.appearance_dim == 0 else appearance.contiguous()
    values = _values(field, inputs, box, codes, spec, early_stop_eps, output)
    face.run("pmf_fused_render_cuda_f32", origins, ctypes.byref(values))
    return output


def _values(
    field: FusedField,
    inputs: list[torch.Tensor],
    box: torch.Tensor,
    codes: torch.Tensor | None,
    spec: MarchSpec,
    early_stop_eps: float,
    output: FusedOutput,
) -> _Parameters:
    """The kernel's parameters; the tensors must outlive the call."""
    origins, directions, near, far, bits, table = inputs
    scales, resolutions, offsets, n_levels, n_features = field.grid.native_arguments
    pointers = {
        "origins": origins,
        "directions": directions,
        "near": near,
        "far": far,
        "jitter": None,
        "aabb": box,
        "bits": bits,
        "table": table,
        "scales": scales,
        "resolutions": resolutions,
        "offsets": offsets,
        "density_weights": field.density,
        "colour_weights": field.colour,
        "pose_weights": field.pose,
        "appearance": codes,
        "n_samples": None,
        "rgb": output.rgb,
        "depth": output.depth,
        "opacity": output.opacity,
        "pose": None if field.pose is None else output.hidden,
    }
    return _Parameters(
        **{name: None if t is None else t.data_ptr() for name, t in pointers.items()},
        n_rays=len(origins),
        resolution=spec.resolution,
        n_cascades=spec.n_cascades,
        step_min=spec.step_min,
        step_max=spec.step_max,
        cone_angle=spec.cone_angle,
        max_samples=spec.max_samples,
        is_table_half=int(table.dtype == torch.float16),
        n_levels=n_levels,
        n_features=n_features,
        hidden=field.density_spec.dims[1],
        n_geo=field.density_spec.dims[2],
        sh_degree=field.sh_degree,
        appearance_dim=field.appearance_dim,
        pose_hidden=0 if field.pose_spec is None else field.pose_spec.dims[-1],
        log_init_density=field.log_init_density,
        max_log_density=field.max_log_density,
        early_stop_eps=early_stop_eps,
    )
