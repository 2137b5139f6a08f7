"""The model of a network's errors: what it measures, that its fit finds what is there, and its file."""

from __future__ import annotations

import json
import math

import pytest
import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.geometry import make_c2w, so3_exp
from posemap_fast.localize import ErrorModel
from posemap_fast.localize.error_model import _FLOOR

FRAME = PoseFrame((0.0, 0.0, 0.0), 2.0)


def poses(n: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn, move = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    return make_c2w(so3_exp(0.3 * turn), spread * move)


def training_poses() -> torch.Tensor:
    """Upright ones at x = 0, 10 and 20."""
    return make_c2w(torch.eye(3).repeat(3, 1, 1), torch.tensor([[0.0, 0, 0], [10, 0, 0], [20, 0, 0]]))


def model(weights: torch.Tensor | None = None, m: int = 3) -> ErrorModel:
    return ErrorModel(training_poses()[:m], torch.zeros(2, 4).double() if weights is None else weights, FRAME.scale)


NOWHERE = torch.full((1, 4, 4), math.nan)


def test_distances_of_a_regressor_are_those_to_the_nearest_training_pose() -> None:
    turn = torch.tensor([[0.0, 0, 0], [0, 0.5, 0], [0, 0, -1.0]])
    asked = make_c2w(so3_exp(turn), torch.tensor([[10.0, 0, 0], [0, 3, 4], [17, 0, 0]]))
    expected = torch.tensor([[0, 0], [5 / 2, 0.5], [3 / 2, 1.0]], dtype=torch.float64)  # 2 world units per unit
    torch.testing.assert_close(model().distances(asked, NOWHERE), expected, rtol=1e-4, atol=1e-3)


def test_distances_of_many_poses_are_those_of_each() -> None:
    asked = poses(150, 0)
    each = torch.cat([model().distances(pose[None], NOWHERE) for pose in asked])
    torch.testing.assert_close(model().distances(asked, NOWHERE), each)
    assert model().distances(asked[:0], NOWHERE).shape == (0, 2)


def test_without_training_poses_distances_are_those_between_the_two_answers() -> None:
    turn = torch.tensor([[0.0, 0, 0], [0, 0.5, 0]])
    solved = make_c2w(so3_exp(turn), torch.tensor([[1.0, 0, 0], [0, 3, 4]]))
    head = make_c2w(torch.eye(3).repeat(2, 1, 1), torch.tensor([[1.0, 0, 0], [0, 0, 0]]))
    expected = torch.tensor([[0, 0], [5 / 2, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(model(m=0).distances(solved, head), expected, rtol=1e-4, atol=1e-3)


def test_sigma_by_hand() -> None:
    weights = torch.tensor([[0.1, 0.5, 0.0, 1.0], [0.2, 0.0, 2.0, 0.5]], dtype=torch.float64)
    asked = make_c2w(so3_exp(torch.tensor([[0, 0.5, 0.0]])), torch.tensor([[10.0, 3, 0]]))
    found = model(weights).sigma(asked, NOWHERE, torch.tensor([[-1.0, 0.6]]))
    wanted_t = math.exp(0.1 + 0.5 * math.log(1.5 + _FLOOR) - 1.0)
    wanted_r = math.exp(0.2 + 2 * math.log(0.5 + _FLOOR) + 0.5 * 0.6)
    assert found[0].tolist() == pytest.approx([wanted_t, wanted_r], rel=1e-3)


@pytest.mark.parametrize("m", [40, 0])
def test_fit_finds_the_law_that_errors_follow(m: int) -> None:
    """Of the distances to 40 training poses, and of those to the head's poses."""
    weights = torch.tensor([[-1.0, 0.8, 0.0, 0.3], [1.5, 0.0, 0.5, 0.7]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    train, asked, head = poses(m, 1), poses(6000, 2, spread=1.5), poses(6000, 4)
    log_sigma = torch.randn(6000, 2, generator=generator)
    law = ErrorModel(train.float(), weights, FRAME.scale)
    exponential = -torch.log1p(-torch.rand(6000, 2, generator=generator, dtype=torch.float64))
    errors = law.sigma(asked, head, log_sigma) * exponential
    found = ErrorModel.fit(train, FRAME, asked, head, log_sigma, errors)
    torch.testing.assert_close(found.weights, weights, rtol=0, atol=0.15)  # the inputs are strongly related
    ratio = found.sigma(asked, head, log_sigma) / law.sigma(asked, head, log_sigma)
    assert float((ratio.log()).abs().mean()) < 0.05


def test_many_training_poses_are_thinned_evenly() -> None:
    found = ErrorModel.fit(poses(2500, 0), FRAME, poses(20, 1), poses(20, 2), torch.zeros(20, 2), torch.ones(20, 2))
    assert torch.equal(found.support, poses(2500, 0)[::3].float())


def test_errors_of_zero_leave_the_fit_finite() -> None:
    found = ErrorModel.fit(poses(5, 0), FRAME, poses(20, 1), poses(20, 2), torch.zeros(20, 2), torch.zeros(20, 2))
    assert bool(found.weights.isfinite().all())


@pytest.mark.parametrize("m", [3, 0])
def test_json_and_support_bring_the_model_back(m: int) -> None:
    weights = torch.rand(2, 4, dtype=torch.float64)
    text = json.dumps(model(weights, m).to_dict())
    found = ErrorModel.from_dict(json.loads(text), training_poses()[:m])
    log_sigma = torch.rand(7, 2)
    answers = (poses(7, 1), poses(7, 2), log_sigma)
    assert torch.equal(found.sigma(*answers), model(weights, m).sigma(*answers))
