"""Calibrated error intervals: the conformal rank by hand, coverage by simulation, and what is refused."""

from __future__ import annotations

import json
import math

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.eval import Calibration, KnownScores, calibrate, reliability, widest
from posemap_fast.eval.calibration import LEVELS


def drawn(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Errors (n, 2) whose scale follows sigma (n, 2), up to factors of 3 and 0.1 that calibration has to find."""
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.rand(n, 2, generator=generator, dtype=torch.float64) + 0.2
    exponential = -torch.log1p(-torch.rand(n, 2, generator=generator, dtype=torch.float64))
    return sigma * exponential * torch.tensor([3.0, 0.1], dtype=torch.float64), sigma


def test_factors_by_hand() -> None:
    """Nine scores: ranks ceil(10 * level) = 5, 7 and 9 of 1, 2, ..., 9 (times 10 for the rotation)."""
    order = torch.tensor([3, 9, 1, 7, 5, 2, 8, 6, 4], dtype=torch.float64)
    sigma = torch.stack([torch.linspace(0.5, 2.0, 9), torch.linspace(2.0, 0.5, 9)], dim=1).double()
    found = calibrate(order * sigma[:, 0], 10 * order.flip(0) * sigma[:, 1], sigma)
    assert LEVELS == (0.5, 0.68, 0.9) and found.n_views == 9
    assert list(found.translation.values()) == pytest.approx([5, 7, 9])
    assert list(found.rotation.values()) == pytest.approx([50, 70, 90])


def test_with_too_few_views_for_a_level_its_factor_is_the_largest_score() -> None:
    found = calibrate(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0]), torch.ones(2, 2))
    assert found.translation == {0.5: 4.0, 0.68: 4.0, 0.9: 4.0}  # ranks 2, 3 -> 2 and 3 -> 2
    assert calibrate(torch.tensor([1.5]), torch.tensor([2.5]), torch.ones(1, 2)).rotation == dict.fromkeys(LEVELS, 2.5)


def test_without_views_there_are_no_factors() -> None:
    found = calibrate(torch.zeros(0), torch.zeros(0), torch.zeros(0, 2))
    assert (found.translation, found.rotation, found.n_views) == ({}, {}, 0)
    assert json.loads(json.dumps(found.to_dict())) == {"t": {}, "r": {}, "n_views": 0}


@pytest.mark.parametrize("level", LEVELS)
def test_new_errors_fall_inside_as_often_as_said(level: float) -> None:
    """Over repeated calibrations the mean coverage of a new view is rank / (n + 1), whatever the distribution."""
    n, repeats, n_new = 39, 300, 200
    rank = math.ceil((n + 1) * level)
    inside = []
    for k in range(repeats):
        errors, sigma = drawn(n + n_new, k)
        factors = calibrate(errors[:n, 0], errors[:n, 1], sigma[:n])
        for column, factor in enumerate((factors.translation[level], factors.rotation[level])):
            inside.append(float((errors[n:, column] <= factor * sigma[n:, column]).double().mean()))
    expected = rank / (n + 1)
    assert expected >= level
    variance = expected * (1 - expected) * (1 / (n + 2) + 1 / n_new)  # of the rank-th order statistic, and of counting
    assert sum(inside) / len(inside) == pytest.approx(expected, abs=4 * math.sqrt(variance / len(inside)))


def test_coverage_on_views_drawn_alike_is_within_binomial_error_of_each_level() -> None:
    errors, sigma = drawn(4000, 5)
    factors = calibrate(errors[:2000, 0], errors[:2000, 1], sigma[:2000])
    for column, factor in enumerate((factors.translation, factors.rotation)):
        found = reliability(errors[2000:, column], sigma[2000:, column], factor)
        for level in LEVELS:
            bound = 4 * math.sqrt(level * (1 - level) * 2 / 2000)
            assert found.coverage[level] == pytest.approx(level, abs=bound)


def test_coverage_and_sharpness_by_hand() -> None:
    errors = torch.tensor([1.0, 2.0, 3.0, 10.0])
    sigma = torch.tensor([4.0, 1.0, 2.0, 3.0])  # the surest half is the second and the third view
    found = reliability(errors, sigma, {0.5: 1.0, 0.9: 2.0})
    assert found.coverage == {0.5: 0.25, 0.9: 0.75}  # 1 <= 4; and 2 <= 2, 3 <= 4: a bound that is met counts
    assert found.p90_all == pytest.approx(3 + 0.7 * 7)
    assert found.p90_surest == pytest.approx(2.9)
    assert found.p90_best == pytest.approx(1.9)  # of 1 and 2
    assert found.to_dict() == {
        "coverage": {"0.5": 0.25, "0.9": 0.75},
        "p90_all": found.p90_all,
        "p90_surest_half": found.p90_surest,
        "p90_best_half": found.p90_best,
    }


def test_the_widest_factor_of_each_level_and_empty_calibrations_have_no_say() -> None:
    first = Calibration({0.5: 1.0, 0.9: 4.0}, {0.5: 2.0, 0.9: 3.0}, 5)
    second = Calibration({0.5: 2.0, 0.9: 3.0}, {0.5: 1.0, 0.9: 1.0}, 7)
    found = widest(first, Calibration({}, {}, 0), second)
    assert found == Calibration({0.5: 2.0, 0.9: 4.0}, {0.5: 2.0, 0.9: 3.0}, 12)
    assert widest(Calibration({}, {}, 0)) == Calibration({}, {}, 0)


def test_the_surest_half_is_better_where_sigma_tells_something_and_not_where_it_does_not() -> None:
    errors, sigma = drawn(4000, 6)
    informed = reliability(errors[:, 0], sigma[:, 0], {})
    shuffled = reliability(errors[:, 0], sigma[torch.randperm(4000, generator=torch.Generator().manual_seed(0)), 0], {})
    assert informed.p90_surest < 0.8 * informed.p90_all
    assert shuffled.p90_surest == pytest.approx(shuffled.p90_all, rel=0.1)


def test_a_single_view_has_a_reliability() -> None:
    found = reliability(torch.tensor([1.0]), torch.tensor([2.0]), {0.5: 0.4})
    assert found.coverage == {0.5: 0.0} and found.p90_all == found.p90_surest == 1.0


@pytest.mark.parametrize(
    ("t_err", "r_err", "sigma"),
    [((3,), (2,), (3, 2)), ((3,), (3,), (3,)), ((3,), (3,), (2, 2)), ((3, 1), (3,), (3, 2)), ((3,), (3,), (3, 3))],
)
def test_errors_and_sigma_that_do_not_fit_are_refused(t_err, r_err, sigma) -> None:
    with pytest.raises(ShapeError, match=r"calibrate: needs errors \(n,\) twice and sigma \(n, 2\)"):
        calibrate(torch.ones(t_err), torch.ones(r_err), torch.ones(sigma))


@pytest.mark.parametrize(("errors", "sigma"), [((3,), (2,)), ((0,), (0,)), ((3, 2), (3, 2)), ((), ())])
def test_reliability_needs_one_sigma_per_error(errors, sigma) -> None:
    with pytest.raises(ShapeError, match=r"both be \(n,\), n >= 1"):
        reliability(torch.ones(errors), torch.ones(sigma), {0.5: 1.0})


def test_single_numbers_are_refused() -> None:
    with pytest.raises(ShapeError, match="errors"):
        calibrate(torch.tensor(1.0), torch.tensor(1.0), torch.ones(1, 2))


def test_views_of_few_places_ask_for_more_and_a_new_place_is_held_as_often_as_said() -> None:
    errors, ones = torch.arange(1.0, 13.0), torch.ones(12, 2)
    place = torch.arange(12) // 3  # four places of three views, from the easiest to the hardest
    assert calibrate(errors, errors, ones, torch.arange(12)).translation == calibrate(errors, errors, ones).translation
    found = calibrate(errors, errors, ones, place).translation
    assert found[0.5] == 8.0 and found[0.9] == 12.0  # of 7.5 and of 13.5 of 12 views
    twice = calibrate(torch.cat([errors, errors[:3]]), torch.ones(15), torch.ones(15, 2), torch.cat([place, place[:3]]))
    assert twice.translation[0.5] == 8.0  # a place counts once, however many views it has

    generator = torch.Generator().manual_seed(4)
    held = []
    for _ in range(400):
        level = (0.5 * torch.randn(13, 1, generator=generator)).exp()  # twelve places and a new one
        scores = level * torch.randn(13, 20, generator=generator).abs()
        known, group = scores[:12].reshape(-1), torch.arange(12).repeat_interleave(20)
        factor = calibrate(known, known, torch.ones(240, 2), group).translation
        held.append([float((scores[12] <= factor[level]).float().mean()) for level in (0.5, 0.9)])
    shares = torch.tensor(held).mean(dim=0).tolist()
    assert 0.5 <= shares[0] < 0.58 and 0.9 <= shares[1] < 0.99


def test_scores_known_from_elsewhere_count_as_places() -> None:
    errors, ones, place = torch.arange(1.0, 5.0), torch.ones(4, 2), torch.zeros(4)  # one place
    assert calibrate(errors, errors, ones, place).translation[0.5] == 4.0  # too few places
    known = KnownScores(torch.linspace(0.1, 1.0, 10), 3)
    found = calibrate(errors, errors, ones, place, known)
    assert found.n_views == 4 and found.translation[0.5] == pytest.approx(0.9)  # 2.5 of 4 places: 0.83 of the known
    assert found.translation[0.68] == 2.0  # 3.4 places: the known ones, and 0.4 of ours
    assert calibrate(errors[:0], errors[:0], ones[:0], None, known).rotation[0.5] == pytest.approx(0.7)


def test_places_must_be_one_per_view() -> None:
    with pytest.raises(ShapeError, match=r"calibrate: groups must be \(n,\), n = 3; got \(2,\)"):
        calibrate(torch.ones(3), torch.ones(3), torch.ones(3, 2), torch.zeros(2))
