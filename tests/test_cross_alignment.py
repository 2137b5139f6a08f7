"""Unlabelled frames judge a network only where it has not learnt them, and their errors decide the intervals."""

from __future__ import annotations

import types

import pytest
import torch

from posemap_fast import results, stages
from posemap_fast.apr import PoseFrame
from posemap_fast.data import ImageStack
from posemap_fast.experiment import load_experiment
from posemap_fast.stages import SceneStages
from posemap_fast.train import Predictions

N = 11


def poses_of(numbers: torch.Tensor) -> torch.Tensor:
    """Poses that tell the number of their image."""
    c2w = torch.eye(4).repeat(len(numbers), 1, 1)
    c2w[:, 0, 3] = numbers.float()
    return c2w


def numbered(n: int) -> ImageStack:
    images = torch.zeros(n, 2, 2, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(n)
    return ImageStack.of(images)


def numbers(images: ImageStack) -> torch.Tensor:
    return images[torch.arange(len(images))][:, 0, 0, 0]


class Recorder(SceneStages):
    """Stages whose alignment only notes what it was shown."""

    def __init__(self, n: int, method: str = "distil", protocol: str = "inductive", n_lost: int = 0):
        overrides = ["network.pose_from=head", f"align.method={method}", "align.share=0.8", "device=cpu"]
        self.config = load_experiment("smoke", (), [*overrides, f"protocol={protocol}"])
        self.views = {"unlabelled": types.SimpleNamespace(images=numbered(n))}
        self.n_lost = n_lost
        self.stages: dict[str, float] = {}

    def _align_stage(self, net, online, images, name, share):
        self.stages[name] = share
        seen = numbers(images)
        stage = stages.DistilAlignStage.__new__(stages.DistilAlignStage)
        stage.net, stage.poses, stage.images = types.SimpleNamespace(seen=set(seen.tolist())), poses_of(seen), images
        stage.config = types.SimpleNamespace(min_gain=0.1)
        stage.gain = torch.where(seen < self.n_lost, 0.0, 0.5)
        return stage

    def _aligned(self, stage):
        return stage.net


@pytest.fixture
def asked(monkeypatch) -> list[tuple[set[int], set[int]]]:
    """What each network that answers has learnt, and what it is asked for."""
    found: list[tuple[set[int], set[int]]] = []

    def predict(net, images: ImageStack) -> Predictions:
        here = numbers(images)
        found.append((net.seen, set(here.tolist())))
        return Predictions(poses_of(here), poses_of(here), torch.zeros(len(here), 2))

    monkeypatch.setattr(stages, "predict", predict)
    return found


def test_each_frame_is_judged_by_a_network_that_learnt_the_others(asked) -> None:
    recorder = Recorder(N, n_lost=2)
    found = recorder.cross_align(types.SimpleNamespace(seen=set()), None)
    assert found is not None and sorted(found.c2w[:, 0, 3].tolist()) == list(range(N))
    for predictions in (found.before, found.aligned):
        assert torch.equal(predictions.c2w, found.c2w) and len(predictions.log_sigma) == N
    assert asked and all(not learnt & wanted for learnt, wanted in asked)
    assert set().union(*(learnt for learnt, _ in asked)) == set(range(N))
    assert recorder.stages == {"align_half_0": 1.0, "align_half_1": 1.0}  # as many as 0.8 of all, or all of a half
    assert found.c2w[~found.is_known, 0, 3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    "case",
    [{"n": 8}, {"n": 0}, {"n": N, "method": "paper"}, {"n": N, "protocol": "transductive"}, {"n": N, "n_lost": 3}],
)
def test_frames_that_cannot_judge(asked, case) -> None:
    recorder = Recorder(**case)
    assert recorder.cross_align(types.SimpleNamespace(seen=set()), None) is None
    assert not recorder.stages or "n_lost" in case


def test_intervals_are_those_that_unlabelled_frames_ask_for(monkeypatch) -> None:
    net = types.SimpleNamespace(refiner=object(), pose_frame=PoseFrame((0.0, 0.0, 0.0), 1.0))
    random_poses = poses_of(torch.arange(40))
    generator = torch.Generator().manual_seed(0)

    def answers(truth: torch.Tensor, size: float) -> Predictions:
        c2w = truth.clone()
        c2w[:, 1, 3] = size * (1 + torch.rand(len(truth), generator=generator))
        return Predictions(c2w, c2w, torch.zeros(len(truth), 2))

    wrong = answers(random_poses, 0.1)
    monkeypatch.setattr(results, "predict", lambda _, images: Predictions(*(v[: len(images)] for v in wrong)))
    images = torch.zeros(40, 2, 2, 3, dtype=torch.uint8)
    views = {
        "train": types.SimpleNamespace(c2w=random_poses),
        "val": types.SimpleNamespace(images=images[:10], c2w=random_poses[:10]),
    }
    truth = poses_of(torch.arange(12))
    model, without = results.model_errors(net, views, (random_poses, images))
    is_known = torch.ones(12, dtype=torch.bool)
    frames = results.JudgedFrames(answers(truth, 0.4), truth, is_known)
    again, found = results.model_errors(net, views, (random_poses, images), frames)
    assert torch.equal(model.weights, again.weights) and (without.n_views, found.n_views) == (30, 12)
    ratio = found.translation[0.5] / without.translation[0.5]
    assert ratio == pytest.approx(4, rel=0.25)
    lost = frames._replace(
        c2w=frames.found.c2w.clone(), is_known=torch.arange(12) < 5
    )  # no error at all, if one believed it
    lost.c2w[:5] = truth[:5]
    _, worse = results.model_errors(net, views, (random_poses, images), lost)
    assert worse.translation[0.5] > found.translation[0.5]
