"""Poses, rotations, cameras, rays and the similarity to the unit cube."""

from __future__ import annotations

from posemap_fast.geometry import lens_colmap  # noqa: F401  (registration)
from posemap_fast.geometry.cameras import Camera
from posemap_fast.geometry.lens import LENSES, Lens, LensModel
from posemap_fast.geometry.poses import (
    c2w_from_vector12,
    check_rigid,
    interpolate_poses,
    invert_c2w,
    look_at,
    make_c2w,
    mean_pose,
    move_poses,
    perturb_poses,
    pose_vector12,
    rigid_defect,
)
from posemap_fast.geometry.rays import camera_rays, project_points
from posemap_fast.geometry.rotations import (
    matrix_from_quaternion,
    nearest_rotation,
    quaternion_from_matrix,
    rotation_angle_deg,
    slerp,
    so3_exp,
    so3_log,
)
from posemap_fast.geometry.scene_frame import SceneFrame

__all__ = [
    "LENSES",
    "Camera",
    "Lens",
    "LensModel",
    "SceneFrame",
    "c2w_from_vector12",
    "camera_rays",
    "check_rigid",
    "interpolate_poses",
    "invert_c2w",
    "look_at",
    "make_c2w",
    "matrix_from_quaternion",
    "mean_pose",
    "move_poses",
    "nearest_rotation",
    "perturb_poses",
    "pose_vector12",
    "project_points",
    "quaternion_from_matrix",
    "rigid_defect",
    "rotation_angle_deg",
    "slerp",
    "so3_exp",
    "so3_log",
]
