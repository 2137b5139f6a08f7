"""Files of a trained scene and the localizers that read them."""

from posemap_fast.localize.error_model import ErrorModel
from posemap_fast.localize.localizer import Localizer, PoseAnswer, PoseRegressor, read_image
from posemap_fast.localize.refined import (
    REFINEMENT,
    MapRefiner,
    RefinedAnswers,
    RefinedErrors,
    RefinedRegressor,
    usual_difference,
)
from posemap_fast.localize.scene_map import SceneMap

__all__ = [
    "REFINEMENT",
    "ErrorModel",
    "Localizer",
    "MapRefiner",
    "PoseAnswer",
    "PoseRegressor",
    "RefinedAnswers",
    "RefinedErrors",
    "RefinedRegressor",
    "SceneMap",
    "read_image",
    "usual_difference",
]
