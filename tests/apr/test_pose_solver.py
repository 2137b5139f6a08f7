"""Pose from points: exact where the points are, robust to wild ones, the prior where they say nothing; gradients."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.apr import solve_pose
from posemap_fast.errors import ShapeError
from posemap_fast.geometry import rotation_angle_deg, so3_exp

_N = 40
_WEAK = torch.full((6,), 1e-9, dtype=torch.float64)


@pytest.fixture
def problem() -> dict[str, torch.Tensor]:
    """True poses of three cameras, points in front of them, and starts some 10 degrees and 0.2 units away."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    flat = torch.cat([0.4 * normal(_N, 2), torch.ones(_N, 1, dtype=torch.float64)], dim=1)
    directions = torch.nn.functional.normalize(flat, dim=1)
    rotation, position = so3_exp(normal(3, 3)), normal(3, 3)
    depth = 1 + 3 * torch.rand(3, _N, 1, generator=generator, dtype=torch.float64)
    points = (depth * directions) @ rotation.transpose(1, 2) + position[:, None]
    start = {"rotation": rotation @ so3_exp(0.1 * normal(3, 3)), "position": position + 0.12 * normal(3, 3)}
    return {"points": points, "directions": directions, "truth": rotation, "at": position, **start}


def _solve(problem, weights=None, precision=_WEAK, iterations=8, scale=10.0, **changes):
    given = {key: problem[key] for key in ("points", "directions", "rotation", "position")} | changes
    if weights is None:
        weights = torch.ones(given["points"].shape[:2], dtype=torch.float64)
    return solve_pose(weights=weights, precision=precision, iterations=iterations, scale=scale, **given)


def _errors(problem, solved) -> tuple[float, float]:
    angle = rotation_angle_deg(solved.rotation, problem["truth"]).max()
    return float((solved.position - problem["at"]).norm(dim=1).max()), float(angle)


def test_exact_points_give_the_exact_pose(problem):
    solved = _solve(problem)
    t, r = _errors(problem, solved)
    assert t < 1e-7
    assert r < 1e-4
    torch.testing.assert_close(solved.rotation @ solved.rotation.mT, torch.eye(3).double().expand(3, 3, 3))


def test_without_weights_the_answer_is_the_prior(problem):
    solved = _solve(problem, weights=torch.zeros(3, _N, dtype=torch.float64))
    torch.testing.assert_close(solved.rotation, problem["rotation"])
    torch.testing.assert_close(solved.position, problem["position"])


def test_a_strong_prior_holds_the_pose_where_it_was_and_a_weak_one_lets_go(problem):
    start = (problem["position"] - problem["at"]).norm(dim=1).max()
    strong, weak = (_solve(problem, precision=_WEAK * factor) for factor in (1e18, 1.0))
    torch.testing.assert_close(strong.position, problem["position"], atol=1e-5, rtol=0)
    assert _errors(problem, weak)[0] < 1e-4 * start


def test_wild_points_cost_little_and_points_that_are_not_finite_nothing(problem):
    wild = problem["points"].clone()
    wild[:, :6] += 4.0
    t, _ = _errors(problem, _solve(problem, points=wild, iterations=30, scale=0.02))
    t_plain, _ = _errors(problem, _solve(problem, points=wild, iterations=30))
    assert t < 0.01 < 0.1 < t_plain
    broken = problem["points"].clone()
    broken[:, 0, 0], broken[:, 1, 1], broken[:, 2] = torch.nan, torch.inf, 1e30
    ignored = torch.ones(3, _N, dtype=torch.float64)
    ignored[:, 2] = 0  # huge, but finite: it has a say unless its weight says otherwise
    solved = _solve(problem, points=broken, weights=ignored)
    assert _errors(problem, solved)[0] < 1e-7


def test_points_behind_the_camera_and_huge_ones_leave_finite_poses_and_gradients(problem):
    for points in (-problem["points"], problem["points"] * 1e20, torch.zeros_like(problem["points"])):
        given = points.clone().requires_grad_()
        solved = _solve(problem, points=given, precision=_WEAK * 1e9, iterations=3)
        (solved.rotation.sum() + solved.position.sum()).backward()
        assert torch.isfinite(solved.rotation).all()
        assert torch.isfinite(solved.position).all()
        assert torch.isfinite(given.grad).all()


def test_gradients_are_those_of_finite_differences(problem):
    few = slice(0, 7)
    directions = problem["directions"][few]

    def solve(points, weights, rotation, position, precision):
        found = solve_pose(points, weights, directions, rotation, position, precision, iterations=2, scale=0.3)
        return tuple(found)

    given = (
        problem["points"][:2, few],
        torch.rand(2, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1,
        problem["rotation"][:2],
        problem["position"][:2],
        torch.full((6,), 0.5, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(solve, tuple(value.clone().requires_grad_() for value in given))


def test_information_is_that_of_the_scatter_of_repeated_noise(problem):
    """Offsets of standard deviation 1 / sqrt(w): the solved positions scatter as the inverse information says."""
    sigma, repeats = 0.004, 400
    generator = torch.Generator().manual_seed(2)
    rotation, position = problem["truth"][:1].expand(repeats, 3, 3), problem["at"][:1].expand(repeats, 3)
    local = (problem["points"][:1] - position[:1, None]) @ rotation[:1]
    depth = (local * problem["directions"]).sum(-1, keepdim=True)
    noise = sigma * torch.randn(repeats, _N, 3, generator=generator, dtype=torch.float64) * depth
    points = problem["points"][:1] + noise
    weights = torch.full((repeats, _N), sigma**-2, dtype=torch.float64)
    solved = _solve(problem, weights, points=points, rotation=rotation, position=position, iterations=5)
    expected = torch.linalg.inv(solved.information[0])[3:, 3:].diagonal().sum().sqrt()
    scatter = (solved.position - position).square().sum(1).mean().sqrt()
    assert 0.85 < scatter / expected < 1.15
    # Two numbers per point, six of all are fitted: what is left is the noise's square and a little less.
    assert 0.85 * 2 * sigma**2 < solved.misfit.mean() < 2 * sigma**2


def test_misfit_is_the_weighted_square_of_what_is_left(problem):
    torch.testing.assert_close(_solve(problem).misfit, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    weights = torch.rand(3, _N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held = _solve(problem, weights, precision=_WEAK * 1e18, scale=0.3)  # by the prior, where it started
    local = (problem["points"] - problem["position"][:, None]) @ problem["rotation"]
    depth = (local * problem["directions"]).sum(-1).clamp(min=0.05)
    across = local - (local * problem["directions"]).sum(-1, keepdim=True) * problem["directions"]
    squared = across.square().sum(-1) / depth**2
    expected = (weights * squared / (1 + squared / 0.3**2)).sum(1) / weights.sum(1)
    torch.testing.assert_close(held.misfit, expected, rtol=1e-4, atol=1e-6)
    nothing = _solve(problem, weights=torch.zeros(3, _N, dtype=torch.float64))
    assert nothing.misfit.tolist() == [0.0] * 3


def test_no_images_and_wrong_shapes(problem):
    empty = {key: problem[key][:0] for key in ("points", "rotation", "position")}
    assert _solve(problem, **empty).position.shape == (0, 3)
    with pytest.raises(ShapeError, match="points"):
        _solve(problem, points=problem["points"][:, :-1])
    with pytest.raises(ShapeError, match="weights"):
        _solve(problem, weights=torch.ones(3, _N + 1, dtype=torch.float64))
