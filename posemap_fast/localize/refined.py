"""Answers by regression, then render and compare: slower, closer, and better at telling how wrong they are.

    image -> PoseRegressor -> pose -> moved until the map looks like the image from there (`render.refine_poses`)

A regression cannot tell that it is wrong; a picture of the map at its answer can. What error to expect of the end is
told by the alignment itself, by how far parts of the picture pull the pose apart (`render.picture_alignment`).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posemap_fast.config import from_dict, to_dict
from posemap_fast.errors import FileFormatError
from posemap_fast.fields import luminance_histogram
from posemap_fast.files import write_text
from posemap_fast.geometry import rotation_angle_deg
from posemap_fast.localize.error_model import scaled_sigma
from posemap_fast.localize.localizer import PoseAnswer, PoseRegressor
from posemap_fast.localize.scene_map import SceneMap
from posemap_fast.render import ImagePoseConfig, refine_poses

__all__ = ["REFINEMENT", "MapRefiner", "RefinedAnswers", "RefinedErrors", "RefinedRegressor"]

REFINEMENT = ImagePoseConfig()
"""Schedule where nothing else is said."""
_VERSION = 2


class RefinedAnswers(NamedTuple):
    """Poses after render and compare."""

    c2w: torch.Tensor  # (n, 4, 4) camera-to-world, world frame: the end, or the start where the end was no closer
    difference: torch.Tensor  # (n,) of picture and image at `c2w`, see `render.RefinedPoses`
    sigma: torch.Tensor  # (n, 2) standard deviation, world units and degrees, see `render.RefinedPoses`; where the end
    # was no closer it is at least what lies between start and end


class MapRefiner:
    """Moves poses until the map looks like the images.

    Whole images are compared, a dark frame that the map did not learn included: undistorted images are better cropped.

    Args:
        scene_map: trained, and frozen by this.
        config: schedule.
    """

    def __init__(self, scene_map: SceneMap, config: ImagePoseConfig):
        self.scene_map, self.config = scene_map, config
        scene_map.nerfp.requires_grad_(False)

    def refine(self, images: torch.Tensor, start: torch.Tensor) -> RefinedAnswers:
        """All at once: (n, H, W, 3) uint8 images of the map's camera (any size), poses (n, 4, 4) near them -> ends."""
        if len(start) == 0:
            return RefinedAnswers(start, start.new_zeros(0), start.new_zeros(0, 2))
        found = self.scene_map
        device = next(found.nerfp.parameters()).device
        images, start = images.to(device), start.to(device=device, dtype=torch.float32)
        codes = found.nerfp.appearance_code(luminance_histogram(images))
        pictures = images.permute(0, 3, 1, 2).float().div(255)
        codes = None if codes is None else codes.detach()
        moved = refine_poses(found.renderer, found.nerfp, found.camera, pictures, codes, start, self.config)
        is_closer = moved.difference < moved.difference_before  # else it went astray
        difference = torch.where(is_closer, moved.difference, moved.difference_before)
        c2w = torch.where(is_closer[:, None, None], moved.c2w, start)
        apart = (moved.c2w[:, :3, 3] - start[:, :3, 3]).norm(dim=1)
        turned = rotation_angle_deg(moved.c2w[:, :3, :3], start[:, :3, :3])
        sigma = torch.where(
            is_closer[:, None], moved.sigma, torch.maximum(moved.sigma, torch.stack([apart, turned], dim=1))
        )
        return RefinedAnswers(c2w, difference, sigma)


@dataclass(frozen=True)
class RefinedErrors:
    """What errors to expect of refined answers.

    Attributes:
        config: schedule of the answers that were judged.
        factors: `t`, `r` -> level, as text -> factor on the sigma of the answers.
    """

    config: ImagePoseConfig
    factors: Mapping[str, Mapping[str, float]]

    def save(self, path: Path, report: Mapping[str, Any]) -> None:
        """Write them as JSON, atomically, with what was measured."""
        stored = {
            "version": _VERSION,
            "config": to_dict(self.config),
            "calibration": {key: dict(levels) for key, levels in self.factors.items()},
            **report,
        }
        write_text(path, json.dumps(stored, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> RefinedErrors:
        """Read what `save` wrote.

        Raises:
            FileFormatError: not such a file, or of another version.
            ConfigError: its schedule is not one.
        """
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["version"] != _VERSION:
                raise FileFormatError(
                    f"{path}: of version {stored['version']}, this program reads {_VERSION}; run 'posemap refine' again"
                )
            factors = {
                key: {level: float(factor) for level, factor in stored["calibration"][key].items()}
                for key in ("t", "r")
            }
            return cls(from_dict(ImagePoseConfig, stored["config"], str(path)), factors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path}: not what 'posemap refine' writes; run it again") from error


class RefinedRegressor:
    """A localizer: a `PoseRegressor` whose answers the map corrects.

    Args:
        regressor: gives the starts.
        scene_map: the map that it was trained with.
        config: schedule.
        errors: of such answers; None: they carry no sigma.
    """

    def __init__(
        self,
        regressor: PoseRegressor,
        scene_map: SceneMap,
        config: ImagePoseConfig,
        errors: RefinedErrors | None = None,
    ):
        self.regressor, self.errors = regressor, errors
        self.camera = regressor.camera
        self.refiner = MapRefiner(scene_map, config)

    def localize(self, image: torch.Tensor) -> PoseAnswer:
        """(H, W, 3) uint8 RGB image of the training camera's aspect ratio -> pose."""
        first = self.regressor.localize(image)
        begin = time.perf_counter()
        answers = self.refiner.refine(image[None], first.c2w[None])
        sigma = (None, None) if self.errors is None else scaled_sigma(self.errors.factors, answers.sigma[0])
        elapsed = first.ms + 1000 * (time.perf_counter() - begin)
        return dataclasses.replace(
            first, c2w=answers.c2w[0].double().cpu(), sigma_t_m=sigma[0], sigma_r_deg=sigma[1], ms=elapsed
        )
