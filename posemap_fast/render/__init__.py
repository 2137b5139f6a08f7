"""Rendering: occupancy grid, rays, whole views with colour, depth and PoseMap."""

from posemap_fast.render import nerfacc_backend  # registration
from posemap_fast.render.backends import RENDER_BACKENDS
from posemap_fast.render.image_pose import (
    ImagePoseConfig,
    RefinedPoses,
    picture_differences,
    refine_poses,
    search_poses,
)
from posemap_fast.render.occupancy import OccupancyConfig, OccupancyGrid
from posemap_fast.render.renderer import PoseField, RayOutput, RenderConfig, Renderer, Samples
from posemap_fast.render.views import (
    POSEMAP_STRIDE,
    PoseMapOutput,
    ViewOutput,
    posemap_shape,
    render_cells,
    render_posemaps,
    render_views,
)

__all__ = [
    "POSEMAP_STRIDE",
    "RENDER_BACKENDS",
    "ImagePoseConfig",
    "OccupancyConfig",
    "OccupancyGrid",
    "PoseField",
    "PoseMapOutput",
    "RayOutput",
    "RefinedPoses",
    "RenderConfig",
    "Renderer",
    "Samples",
    "ViewOutput",
    "nerfacc_backend",
    "picture_differences",
    "posemap_shape",
    "refine_poses",
    "render_cells",
    "render_posemaps",
    "render_views",
    "search_poses",
]
