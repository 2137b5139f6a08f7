"""Answers by regression, then render and compare: slower, closer, and better at telling how wrong they are.

    image -> PoseRegressor -> pose -> moved until the map looks like the image from there (`render.refine_poses`)

A regression cannot tell that it is wrong; a picture of the map at its answer can: where that differs from the image by
more than pictures of this map do, starts around the answer are tried (`render.search_poses`). What error to expect of
the end is told by the alignment itself, by how far parts of the picture pull the pose apart
(`render.picture_alignment`).
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
from posemap_fast.data import ImageStack
from posemap_fast.errors import FileFormatError
from posemap_fast.fields import luminance_histogram
from posemap_fast.files import write_text
from posemap_fast.geometry import rotation_angle_deg
from posemap_fast.localize.error_model import scaled_sigma
from posemap_fast.localize.localizer import PoseAnswer, PoseRegressor
from posemap_fast.localize.scene_map import SceneMap
from posemap_fast.render import ImagePoseConfig, picture_differences, refine_poses, search_poses

__all__ = ["REFINEMENT", "MapRefiner", "RefinedAnswers", "RefinedErrors", "RefinedRegressor", "usual_difference"]

REFINEMENT = ImagePoseConfig()
"""Schedule where nothing else is said."""
_VERSION = 2
_DOUBTFUL = 4.0  # times the usual difference (docs/results/refinement.md)
_JUDGED_VIEWS, _AT_ONCE = 24, 8


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
        """All at once: (n, H, W, 3) uint8 images of the map's camera (any size), poses (n, 4, 4) near them -> ends.

        Where the end looks less like the image than pictures of this map usually do, starts around the given one are
        tried too.
        """
        if len(start) == 0:
            return RefinedAnswers(start, start.new_zeros(0), start.new_zeros(0, 2))
        pictures, codes = self._inputs(images)
        start = start.to(device=pictures.device, dtype=torch.float32)
        first, usual = self._moved(pictures, codes, start), self.scene_map.usual_difference
        if usual is None:
            return first
        doubtful = torch.nonzero(first.difference > _DOUBTFUL * usual).flatten()
        if len(doubtful) == 0:
            return first
        pictures, codes = pictures[doubtful], None if codes is None else codes[doubtful]
        found = self.scene_map
        others = search_poses(found.renderer, found.nerfp, found.camera, pictures, codes, start[doubtful], self.config)
        again = self._moved(pictures, codes, others)
        is_better = again.difference < first.difference[doubtful]
        parts = zip(first, again, strict=True)
        return RefinedAnswers(*(a.index_copy(0, doubtful[is_better], b[is_better]) for a, b in parts))

    def differences(self, images: torch.Tensor, c2w: torch.Tensor) -> torch.Tensor:
        """(n,) how much the map's pictures from poses (n, 4, 4) differ from images, see `render.RefinedPoses`."""
        pictures, codes = self._inputs(images)
        c2w = c2w.to(device=pictures.device, dtype=torch.float32)
        found = self.scene_map
        return picture_differences(found.renderer, found.nerfp, found.camera, pictures, codes, c2w, self.config)

    def _inputs(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pictures (n, 3, H, W) in [0, 1] and appearance codes (n, dim), where the map is."""
        images = images.to(next(self.scene_map.nerfp.parameters()).device)
        codes = self.scene_map.nerfp.appearance_code(luminance_histogram(images))
        return images.permute(0, 3, 1, 2).float().div(255), None if codes is None else codes.detach()

    def _moved(self, pictures: torch.Tensor, codes: torch.Tensor | None, start: torch.Tensor) -> RefinedAnswers:
        found = self.scene_map
        moved = refine_poses(found.renderer, found.nerfp, found.camera, pictures, codes, start, self.config)
        is_closer = moved.difference < moved.difference_before  # else it went astray
        difference = torch.where(is_closer, moved.difference, moved.difference_before)
        c2w = torch.where(is_closer[:, None, None], moved.c2w, start)
        apart = (moved.c2w[:, :3, 3] - start[:, :3, 3]).norm(dim=1)
        turned = rotation_angle_deg(moved.c2w[:, :3, :3], start[:, :3, :3])
        sigma = torch.where(
            is_closer[:, None], moved.sigma, torch.fmax(moved.sigma, torch.stack([apart, turned], dim=1))
        )
        return RefinedAnswers(c2w, difference, sigma)


def usual_difference(scene_map: SceneMap, images: ImageStack, c2w: torch.Tensor) -> float:
    """How much pictures of a map differ from photographs of its place: 90th percentile over some training views.

    Args:
        images: (n, H, W, 3) uint8, n >= 1.
        c2w: (n, 4, 4) their poses.
    """
    refiner = MapRefiner(scene_map, REFINEMENT)
    chosen = torch.arange(0, len(images), -(-len(images) // _JUDGED_VIEWS), device=c2w.device)
    found = [refiner.differences(images[part], c2w[part]) for part in chosen.split(_AT_ONCE)]
    return float(torch.cat(found).quantile(0.9))


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
