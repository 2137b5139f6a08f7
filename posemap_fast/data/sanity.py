"""Checks of poses, cameras and splits that need no pixel: each gives plain numbers and names for a report.

Poses are OpenCV camera-to-world in the dataset's world frame and unit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from posemap_fast.data.box_fit import BoxOptions, up_direction, wild_cameras
from posemap_fast.geometry import Lens, rigid_defect, rotation_angle_deg

__all__ = ["N_NAMED", "describe_cameras", "describe_extent", "describe_poses", "nearest_training_views"]

N_NAMED = 5  # names given as examples of what was found
_SAME_CENTRE = 1e-6  # of the diameter of the camera centres
_SAME_ANGLE_DEG = 1e-3
_CHUNK = 512  # test views compared with all training views at a time


def describe_cameras(lenses: Sequence[Lens]) -> dict[str, Any]:
    """Stored image sizes and intrinsics: how many distinct ones, and the commonest."""
    sizes = Counter(f"{lens.camera.width}x{lens.camera.height}" for lens in lenses)
    kinds = Counter(lenses)
    return {
        "sizes": dict(sizes.most_common()),
        "n_cameras": len(kinds),
        "cameras": [
            {
                "views": count,
                **lens.camera.to_dict(),
                "model": lens.model,
                "coefficients": list(lens.coefficients),
            }
            for lens, count in kinds.most_common(N_NAMED)
        ],
    }


def describe_poses(names: Sequence[str], c2w: torch.Tensor) -> dict[str, Any]:
    """Whether poses (n, 4, 4) are rigid, their determinants and handedness, and whether the cameras stand upright."""
    rotation = c2w[:, :3, :3]
    determinant = torch.linalg.det(rotation)
    identity = torch.eye(3, dtype=c2w.dtype)
    defects = {name: defect for name, pose in zip(names, c2w, strict=True) if (defect := rigid_defect(pose))}
    n_left = int((determinant < 0).sum())
    handedness = {0: "right-handed", len(names): "left-handed"}.get(n_left, f"{n_left} of {len(names)} left-handed")
    upright = (-rotation[:, :, 1]).numpy() @ up_direction(c2w.numpy()) > 0
    return {
        "n_rigid": len(names) - len(defects),
        "not_rigid": [f"{name} {defect}" for name, defect in list(defects.items())[:N_NAMED]],
        "largest_rotation_defect": float((rotation.transpose(1, 2) @ rotation - identity).abs().amax()),
        "determinants": [float(determinant.min()), float(determinant.max())],
        "handedness": handedness,
        "n_upside_down": int((~upright).sum()),
    }


def describe_extent(names: Sequence[str], c2w: torch.Tensor) -> dict[str, Any]:
    """Box of the camera centres, and the views absurdly far from the others."""
    centres = c2w[:, :3, 3].numpy()
    low, high = centres.min(0), centres.max(0)
    far = np.flatnonzero(wild_cameras(centres, BoxOptions().wild_factor))
    return {
        "camera_box": [low.tolist(), high.tolist()],
        "camera_extent": (high - low).tolist(),
        "n_far_off": len(far),
        "far_off": [names[view] for view in far[:N_NAMED]],
    }


def _nearest(test: torch.Tensor, train: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each test pose the distance (m,) to the nearest training centre and its index (m,)."""
    parts = []
    for chunk in test[:, :3, 3].split(_CHUNK):
        between = torch.cdist(chunk, train[:, :3, 3], compute_mode="donot_use_mm_for_euclid_dist")
        parts.append(between.min(dim=1))
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nearest_training_views(
    names: Sequence[str], c2w: torch.Tensor, splits: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """How far test views are from the training view with the nearest centre, and which share its pose.

    Args:
        names: n.
        c2w: (n, 4, 4).
        splits: view indices under train and test, neither empty.
    Returns:
        medians in world units and degrees, and test views whose pose is that of a training view.
    """
    train, test = c2w[list(splits["train"])], c2w[list(splits["test"])]
    distance, nearest = _nearest(test, train)
    angle = rotation_angle_deg(test[:, :3, :3], train[nearest, :3, :3])
    diameter = float(torch.linalg.vector_norm(c2w[:, :3, 3].amax(0) - c2w[:, :3, 3].amin(0)))
    same = torch.nonzero((distance <= _SAME_CENTRE * diameter) & (angle <= _SAME_ANGLE_DEG)).flatten().tolist()
    return {
        "median_distance": float(distance.median()),
        "median_angle_deg": float(angle.median()),
        "n_identical_poses": len(same),
        "identical_poses": [
            [names[splits["test"][view]], names[splits["train"][int(nearest[view])]]] for view in same[:N_NAMED]
        ],
    }
