"""The four training stages, the loop that runs and resumes them, and what they share."""

from posemap_fast.train.align import AlignConfig, AlignStage
from posemap_fast.train.apr import APRStage, APRTrainConfig, LossWeights, OnlineMap, rendered_size
from posemap_fast.train.checkpoint import Checkpoint, Checkpointer
from posemap_fast.train.distil_align import DistilAlignStage
from posemap_fast.train.loop import DivergenceError, Stage, run_stage
from posemap_fast.train.metrics_log import MetricsLog
from posemap_fast.train.nerfp import FieldStage, FieldTrainConfig, TrainingViews
from posemap_fast.train.pose_branch import PoseBranchConfig, PoseBranchStage
from posemap_fast.train.prune import prune_occupancy
from posemap_fast.train.random_views import RandomViewSource, ViewBank
from posemap_fast.train.rvs import RVSConfig, ViewSampler
from posemap_fast.train.selection import BestState, Predictions, predict, predict_poses, validation_score
from posemap_fast.train.view_cache import ViewCache

__all__ = [
    "APRStage",
    "APRTrainConfig",
    "AlignConfig",
    "AlignStage",
    "BestState",
    "Checkpoint",
    "Checkpointer",
    "DistilAlignStage",
    "DivergenceError",
    "FieldStage",
    "FieldTrainConfig",
    "LossWeights",
    "MetricsLog",
    "OnlineMap",
    "PoseBranchConfig",
    "PoseBranchStage",
    "Predictions",
    "RVSConfig",
    "RandomViewSource",
    "Stage",
    "TrainingViews",
    "ViewBank",
    "ViewCache",
    "ViewSampler",
    "predict",
    "predict_poses",
    "prune_occupancy",
    "rendered_size",
    "run_stage",
    "validation_score",
]
