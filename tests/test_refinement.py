"""Errors of refined answers: what tells them, and that no view is judged by a model that was fitted on it."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from posemap_fast import refinement
from posemap_fast.apr import PoseFrame
from posemap_fast.data import ImageStack
from posemap_fast.errors import DatasetError
from posemap_fast.eval.basin import displaced
from posemap_fast.localize import REFINEMENT, MapRefiner, RefinedAnswers, refined, usual_difference
from posemap_fast.progress import NoProgress
from posemap_fast.refinement import PosedImages, calibrate_refined, score_refined
from posemap_fast.render import RefinedPoses
from posemap_fast.train import Checkpointer

NET = types.SimpleNamespace(pose_frame=PoseFrame((0.0, 0.0, 0.0), 1.0))


def upright(n: int) -> torch.Tensor:
    """On a line, one metre apart."""
    poses = torch.eye(4).double().repeat(n, 1, 1)
    poses[:, 1, 3] = torch.arange(n)
    return poses


class HalfWay:
    """A refiner that halves the error, and whose sigma is such that the rest is a usual Gaussian one of it."""

    config = REFINEMENT

    def __init__(self, truth: torch.Tensor, scale: float = 1.0):
        self.truth, self.scale = truth, scale
        self.generator = torch.Generator().manual_seed(1)

    def refine(self, images: torch.Tensor, start: torch.Tensor) -> RefinedAnswers:
        index = images[:, 0, 0, 0].long()
        c2w = start.clone()
        left = (start[:, :3, 3] - self.truth[index, :3, 3]) / 2
        c2w[:, :3, 3] = self.truth[index, :3, 3] + left
        scores = torch.randn(len(start), 3, generator=self.generator).norm(dim=1)
        sigma = self.scale * (left.norm(dim=1).float() / scores)[:, None] * torch.tensor([1.0, 200.0])
        return RefinedAnswers(c2w.float(), torch.ones(len(start)), sigma)


def posed(truth: torch.Tensor) -> PosedImages:
    """Images whose first byte is their number."""
    images = torch.zeros(len(truth), 4, 4, 3, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(len(truth))
    return PosedImages("painted, val", ImageStack.of(images), truth)


@pytest.fixture
def wrong_by(monkeypatch):
    """Makes a network wrong by 1 to 10 cm and as many degrees, by image."""

    def predict(net, images: ImageStack) -> torch.Tensor:
        rng, truth = torch.Generator().manual_seed(len(images)), upright(len(images))
        errors = 0.01 * (1 + 9 * torch.rand(len(images), generator=rng))
        poses = [displaced(truth[i : i + 1], float(e), 100 * float(e), rng) for i, e in enumerate(errors)]
        return torch.cat(poses).float()

    monkeypatch.setattr(refinement, "predict_poses", predict)


@pytest.mark.usefixtures("wrong_by")
def test_expected_errors_follow_the_evidence_and_hold_as_often_as_said() -> None:
    validation, test = posed(upright(40)), posed(upright(200))
    errors = calibrate_refined(HalfWay(validation.c2w), NET, validation, 0, NoProgress())
    start = refinement.predict_poses(NET, test.images)
    score = score_refined(HalfWay(test.c2w), start, test, errors, NoProgress())
    assert float(score.errors[:, 0].median()) == pytest.approx(float(score.errors_before[:, 0].median()) / 2, rel=1e-3)
    found = score.reliability["t"]
    assert all(
        level - 0.1 < share < level + 0.3 for level, share in found.coverage.items()
    )  # for a fifth place, from four
    assert found.p90_surest < 0.95 * found.p90_all  # 0.55 with a perfect order
    stored = score.to_dict()
    assert stored["refined"]["n_test"] == 200 and stored["ms_per_image"] >= 0
    unknown = score_refined(HalfWay(test.c2w), start, test, None, NoProgress())
    assert unknown.reliability == {} and torch.equal(unknown.errors, score.errors)


@pytest.mark.usefixtures("wrong_by")
def test_sigma_that_promises_too_much_is_scaled_up_and_what_is_usual_holds_it_back() -> None:
    validation = posed(upright(40))
    refiners = (HalfWay(validation.c2w, scale) for scale in (1.0, 0.1))
    factors = [calibrate_refined(refiner, NET, validation, 0, NoProgress()).factors["t"] for refiner in refiners]
    assert factors[0]["0.5"] < factors[0]["0.68"] < factors[0]["0.9"]
    assert factors[1]["0.9"] > 8 * factors[0]["0.9"] and factors[0]["0.5"] < factors[1]["0.5"] < 8 * factors[0]["0.5"]


def test_few_validation_views_are_refused() -> None:
    few = posed(upright(7))
    with pytest.raises(DatasetError, match=r"painted, val: 7 view\(s\) are too few"):
        calibrate_refined(HalfWay(few.c2w), NET, few, 0, NoProgress())


class Counting(HalfWay):
    """Tells which images it has refined, and is interrupted when it would be more than some."""

    def __init__(self, truth: torch.Tensor, n_most: int = 1000):
        super().__init__(truth)
        self.seen: list[int] = []
        self.n_most = n_most

    def refine(self, images: torch.Tensor, start: torch.Tensor) -> RefinedAnswers:
        self.seen += images[:, 0, 0, 0].tolist()
        if len(self.seen) > self.n_most:
            raise KeyboardInterrupt
        found = super().refine(images, start)
        return found._replace(sigma=torch.ones(len(start), 2))


@pytest.mark.usefixtures("wrong_by")
def test_an_interrupted_judgement_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    def keep(name: str) -> Checkpointer:
        return Checkpointer(tmp_path / name, every_seconds=0)

    test = posed(upright(30))
    start = refinement.predict_poses(NET, test.images)

    def score(refiner: Counting, start: torch.Tensor = start) -> torch.Tensor:
        return score_refined(refiner, start, test, None, NoProgress(), keep).errors

    with pytest.raises(KeyboardInterrupt):
        score(Counting(test.c2w, n_most=20))
    again, finished, others = (Counting(test.c2w) for _ in range(3))
    errors = score(again)
    assert again.seen == list(range(16, 30))
    torch.testing.assert_close(errors, score(finished))
    assert finished.seen == []
    torch.testing.assert_close(errors, score_refined(Counting(test.c2w), start, test, None, NoProgress()).errors)
    assert float(score(others, test.c2w).max()) < 1e-6 and len(others.seen) == 30  # of other answers
    others.config = dataclasses.replace(REFINEMENT, rows=12)
    score(others, test.c2w)
    assert len(others.seen) == 60
    monkeypatch.setattr(refinement, "REFINEMENT_VERSION", 0)
    score(others, test.c2w)
    assert len(others.seen) == 90


@pytest.mark.usefixtures("wrong_by")
def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path) -> None:
    validation = posed(upright(20))

    def factors(refiner: Counting, name: str) -> object:
        common = (refiner, NET, validation, 0, NoProgress())
        return calibrate_refined(*common, lambda part: Checkpointer(tmp_path / name / part, every_seconds=0)).factors

    whole, again = Counting(validation.c2w), Counting(validation.c2w)
    with pytest.raises(KeyboardInterrupt):
        factors(Counting(validation.c2w, n_most=30), "cut")
    assert factors(again, "cut") == factors(whole, "whole")
    assert len(whole.seen) == 40 and again.seen == list(range(8, 20))  # of the second starts


class NoField(torch.nn.Linear):
    """Something with parameters and without appearance."""

    def appearance_code(self, histograms: torch.Tensor) -> None:
        return None


@pytest.fixture
def refiner() -> MapRefiner:
    """One whose map is nothing: what moves poses is to be replaced."""
    fields = {"nerfp": NoField(1, 1), "renderer": None, "camera": None, "pose_frame": NET.pose_frame}
    fields["usual_difference"] = None
    return MapRefiner(types.SimpleNamespace(**fields), REFINEMENT)


def test_an_answer_that_went_astray_is_taken_back(refiner, monkeypatch) -> None:
    start = upright(3).float()
    ends = start.clone()
    ends[:, 0, 3] = torch.tensor([1.0, 1.0, 0.5])
    after, before = torch.tensor([0.1, 0.3, float("nan")]), torch.full((3,), 0.2)
    moved = RefinedPoses(ends, after, before, torch.rand(3, 2))
    monkeypatch.setattr(refined, "refine_poses", lambda *_: moved)
    found = refiner.refine(torch.zeros(3, 4, 4, 3, dtype=torch.uint8), start)
    assert found.c2w[:, 0, 3].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(found.difference, torch.tensor([0.1, 0.2, 0.2]))
    torch.testing.assert_close(found.sigma[0], moved.sigma[0])
    assert float(found.sigma[1, 0]) >= 1.0  # what lies between start and end
    assert not any(p.requires_grad for p in refiner.scene_map.nerfp.parameters())


def test_nothing_to_refine_is_fine(refiner) -> None:
    found = refiner.refine(torch.zeros(0, 4, 4, 3, dtype=torch.uint8), torch.zeros(0, 4, 4))
    assert found.c2w.shape == (0, 4, 4) and found.difference.shape == (0,) and found.sigma.shape == (0, 2)


@pytest.mark.parametrize("usual", [None, 0.1])
def test_only_answers_that_look_wrong_are_searched_around_and_only_better_ones_are_taken(
    refiner, monkeypatch, usual: float | None
) -> None:
    """Differences 0.1, 0.5, 0.6 at first; around the last two 0.2 and 0.7 are found."""
    searched = []

    def move(renderer, nerfp, camera, pictures, codes, start, config) -> RefinedPoses:
        number = (255 * pictures[:, 0, 0, 0]).round().long()
        is_again = start[:, 2, 3] > 0
        ends = start.clone()
        ends[:, 0, 3] = torch.where(is_again, 2.0, 1.0)
        after = torch.where(is_again, torch.tensor([9, 0.2, 0.7])[number], torch.tensor([0.1, 0.5, 0.6])[number])
        return RefinedPoses(ends, after, torch.ones(len(start)), ends[:, :2, 3])

    def search(renderer, nerfp, camera, pictures, codes, around, config) -> torch.Tensor:
        searched.append((255 * pictures[:, 0, 0, 0]).round().int().tolist())
        found = around.clone()
        found[:, 2, 3] = 1.0
        return found

    refiner.scene_map.usual_difference = usual
    monkeypatch.setattr(refined, "refine_poses", move)
    monkeypatch.setattr(refined, "search_poses", search)
    found = refiner.refine(posed(upright(3)).images[torch.arange(3)], upright(3))
    assert searched == ([] if usual is None else [[1, 2]])
    assert found.c2w[:, 0, 3].tolist() == [1.0, 1.0 if usual is None else 2.0, 1.0]
    torch.testing.assert_close(found.difference, torch.tensor([0.1, 0.5 if usual is None else 0.2, 0.6]))
    assert found.sigma[:, 0].tolist() == found.c2w[:, 0, 3].tolist()


def test_what_is_usual_is_told_by_two_dozen_training_views_at_most(monkeypatch) -> None:
    seen = []

    def differences(self, images: torch.Tensor, c2w: torch.Tensor) -> torch.Tensor:
        assert torch.equal(images[:, 0, 0, 0].double(), c2w[:, 1, 3])
        seen.extend(images[:, 0, 0, 0].tolist())
        return c2w[:, 1, 3].float()

    monkeypatch.setattr(MapRefiner, "differences", differences)
    views = posed(upright(50))
    scene_map = types.SimpleNamespace(nerfp=NoField(1, 1))
    assert usual_difference(scene_map, views.images, views.c2w) == pytest.approx(0.9 * 48, abs=1)
    assert seen == list(range(0, 50, 3))
    assert usual_difference(scene_map, views.images[:1], views.c2w[:1]) == 0
