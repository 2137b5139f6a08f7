"""Choice of a model on the validation part that was cut from the training images (never on the test split)."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from posemap_fast.apr import APRNet
from posemap_fast.data import ImageStack
from posemap_fast.geometry import rotation_angle_deg
from posemap_fast.train.nerfp import TrainingViews

__all__ = ["BestState", "GuardedState", "Predictions", "network_input", "predict", "predict_poses", "validation_score"]


def network_input(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float in [0, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div(255).contiguous(memory_format=torch.channels_last)


class Predictions(NamedTuple):
    """What a network answers for some images."""

    c2w: torch.Tensor  # (n, 4, 4) camera-to-world
    head_c2w: torch.Tensor  # (n, 4, 4) of the head alone; the same where the pose is not solved for
    log_sigma: torch.Tensor  # (n, 2) of the network, see `PoseHead.log_sigma`


@torch.no_grad()
def predict(net: APRNet, images: ImageStack | torch.Tensor, batch: int = 16) -> Predictions:
    """(n, H, W, 3) uint8 -> poses and what tells how good they are, in evaluation mode."""
    was_training = net.training
    net.eval()
    outputs = [net(network_input(chunk)) for chunk in images.split(batch)]
    net.train(was_training)
    if not outputs:
        none = torch.zeros(0, 4, 4, device=images.device)
        return Predictions(none, none, torch.zeros(0, 2, device=images.device))
    parts = zip(*((o.c2w, o.head_c2w, o.log_sigma) for o in outputs), strict=True)
    return Predictions(*(torch.cat(part) for part in parts))


def predict_poses(net: APRNet, images: ImageStack | torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Only the poses (n, 4, 4) of `predict`."""
    return predict(net, images, batch).c2w


def validation_score(net: APRNet, views: TrainingViews) -> dict[str, float]:
    """Median errors on validation views and one score: translation relative to the pose scale plus radians."""
    predicted = predict_poses(net, views.images)
    translation = (predicted[:, :3, 3] - views.c2w[:, :3, 3]).norm(dim=1).median()
    rotation = rotation_angle_deg(predicted[:, :3, :3], views.c2w[:, :3, :3]).median()
    score = translation / net.pose_frame.scale + torch.deg2rad(rotation)
    return {"val_t_m": float(translation), "val_r_deg": float(rotation), "val_score": float(score)}


class BestState:
    """Keeps the network state with the lowest validation score; without validation views, the last one.

    Args:
        net: the network in training.
        validation: labelled views; may be empty.
        every: steps between two looks.
        n_steps: the last step is always looked at.
        first: states before this step are validated, but not kept: while the learning rate is high, a good score on
            a few validation views is luck.
    """

    def __init__(self, net: APRNet, validation: TrainingViews, every: int, n_steps: int, first: int = 0):
        self.net, self.validation, self.every, self.n_steps, self.first = net, validation, every, n_steps, first
        self.state: dict[str, Any] = {"score": float("inf"), "step": 0, "net": copy.deepcopy(net.state_dict())}

    def look(self, done: int) -> dict[str, float]:
        """Validate after `done` steps when it is time to; returns the errors, or nothing."""
        last = done == self.n_steps
        if len(self.validation) == 0:
            if last:
                self._keep(0.0, done)
            return {}
        if done % self.every and not last:
            return {}
        values = validation_score(self.net, self.validation)
        if self._is_wanted(values["val_score"], done):
            self._keep(values["val_score"], done)
        return values

    def _is_wanted(self, score: float, done: int) -> bool:
        return done >= self.first and score < self.state["score"]

    def _keep(self, score: float, step: int) -> None:
        self.state = {"score": score, "step": step, "net": copy.deepcopy(self.net.state_dict())}


class GuardedState(BestState):
    """Keeps the last state whose validation score is not worse than the start's by more than a share.

    For training that is meant to help elsewhere than on the validation views (alignment): there the best score would
    be luck, but a bad one is a warning.

    Args:
        net, validation, every, n_steps: as `BestState`.
        tolerance: share by which the score may rise.
    """

    def __init__(self, net: APRNet, validation: TrainingViews, every: int, n_steps: int, tolerance: float):
        super().__init__(net, validation, every, n_steps)
        if len(validation) > 0:
            start = validation_score(net, validation)["val_score"]
            self.state |= {"score": start, "limit": start * (1 + tolerance)}

    def _is_wanted(self, score: float, done: int) -> bool:
        return score <= self.state["limit"]

    def _keep(self, score: float, step: int) -> None:
        limit = self.state.get("limit")
        super()._keep(score, step)
        if limit is not None:
            self.state["limit"] = limit
