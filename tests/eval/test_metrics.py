"""Pose errors, their summary, and image similarity against hand-made and brute-force values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.eval import pose_errors, psnr_db, ssim, summarize
from posemap_fast.geometry import make_c2w, quaternion_from_matrix, so3_exp


def random_poses(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rotation = so3_exp(torch.randn(n, 3, generator=g, dtype=torch.float64) * 2)
    return make_c2w(rotation, torch.randn(n, 3, generator=g, dtype=torch.float64) * 5)


def moved(c2w: torch.Tensor, metres: float, degrees: float) -> torch.Tensor:
    turn = so3_exp(torch.tensor([0.0, 0.0, math.radians(degrees)], dtype=torch.float64))
    step = torch.tensor([0.0, metres, 0.0], dtype=torch.float64)
    return make_c2w(c2w[:, :3, :3] @ turn, c2w[:, :3, 3] + step)


@pytest.mark.parametrize(("metres", "degrees"), [(0, 0), (1e-6, 1e-5), (0.3, 4.0), (12.0, 90.0), (1.0, 179.999)])
def test_a_known_motion_is_measured_exactly_from_tiny_to_half_a_turn(metres: float, degrees: float) -> None:
    gt = random_poses(20)
    t_err, r_err = pose_errors(moved(gt, metres, degrees), gt)
    torch.testing.assert_close(t_err, torch.full((20,), float(metres), dtype=torch.float64), atol=1e-14, rtol=1e-9)
    torch.testing.assert_close(r_err, torch.full((20,), float(degrees), dtype=torch.float64), atol=1e-7, rtol=1e-9)


def test_the_angle_is_that_of_the_quaternions() -> None:
    a, b = random_poses(50, 1), random_poses(50, 2)
    inner = (quaternion_from_matrix(a[:, :3, :3]) * quaternion_from_matrix(b[:, :3, :3])).sum(-1).abs().clamp(max=1)
    torch.testing.assert_close(pose_errors(a, b)[1], torch.rad2deg(2 * torch.acos(inner)), atol=1e-6, rtol=1e-9)


def test_errors_do_not_depend_on_the_world_frame_or_the_camera_axes() -> None:
    gt, pred, world = random_poses(9, 3), random_poses(9, 4), random_poses(1, 5)[0]
    flip = torch.diag(torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64))
    for ours, theirs in zip(pose_errors(pred, gt), pose_errors(world @ pred @ flip, world @ gt @ flip), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 3)])
def test_a_missing_answer_is_infinitely_wrong_in_both(value: float, place: tuple[int, int]) -> None:
    gt = random_poses(3)
    pred = gt.clone().float()
    pred[1][place] = value
    t_err, r_err = pose_errors(pred, gt)
    assert torch.isinf(t_err).tolist() == torch.isinf(r_err).tolist() == [False, True, False]


def test_a_truth_that_is_no_pose_is_refused() -> None:
    gt = random_poses(2)
    broken = gt.clone()
    broken[1, :3, :3] *= 2
    with pytest.raises(ShapeError, match="pose_errors: gt_c2w: pose 1 is not rigid"):
        pose_errors(gt, broken)
    with pytest.raises(ShapeError, match=r"pred_c2w must have shape \(2, 4, 4\)"):
        pose_errors(gt[:1], gt)


def test_the_summary_of_four_views_by_hand() -> None:
    t = torch.tensor([0.04, 0.20, 0.40, 3.0])
    r = torch.tensor([4.0, 1.0, 6.0, 9.0])
    summary = summarize(t, r)
    recall = summary.pop("recall")
    assert summary == pytest.approx(
        {"n_test": 4, "median_t_m": 0.3, "median_r_deg": 5.0, "mean_t_m": 0.91, "mean_r_deg": 5.0}
    )
    assert recall == {"0.05m_5deg": 0.25, "0.25m_2deg": 0.25, "0.5m_5deg": 0.5, "5m_10deg": 1.0}


def test_recall_needs_both_errors_within_and_the_threshold_counts_as_within() -> None:
    t = torch.tensor([0.05, 0.05, 0.06], dtype=torch.float64)
    recall = summarize(t, torch.tensor([5.0, 5.1, 5.0], dtype=torch.float64))["recall"]
    assert recall["0.05m_5deg"] == pytest.approx(1 / 3)


def test_medians_stay_finite_until_half_of_the_answers_are_missing() -> None:
    inf = math.inf
    few = summarize(torch.tensor([0.1, 0.2, 0.3, inf]), torch.tensor([1.0, 2.0, 3.0, inf]))
    assert (few["median_t_m"], few["median_r_deg"]) == pytest.approx((0.25, 2.5))
    assert few["mean_t_m"] == inf
    half = summarize(torch.tensor([0.1, 0.2, inf, inf]), torch.tensor([1.0, 2.0, inf, inf]))
    assert half["median_t_m"] == inf
    all_gone = summarize(torch.tensor([inf, inf]), torch.tensor([inf, inf]))
    assert all_gone["median_t_m"] == inf
    assert set(all_gone["recall"].values()) == {0.0}


def test_the_summary_of_no_view_is_not_a_number_and_no_crash() -> None:
    summary = summarize(torch.zeros(0), torch.zeros(0))
    assert summary["n_test"] == 0
    assert math.isnan(summary["median_t_m"])


def test_an_error_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ShapeError, match="must not be NaN"):
        summarize(torch.tensor([math.nan]), torch.tensor([1.0]))


def test_psnr_of_a_known_difference() -> None:
    truth = torch.full((4, 5, 3), 0.5)
    assert psnr_db(truth + 0.1, truth) == pytest.approx(20.0, abs=1e-5)
    assert psnr_db(truth, truth) == math.inf
    assert psnr_db(truth * 0 + 7, truth * 0 + 1) == math.inf, "values are clamped as a display would"


def brute_force_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """The definition, window by window."""
    offset = np.arange(11) - 5
    window = np.exp(-(offset[:, None] ** 2 + offset[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            for c in range(3):
                a, b = x[i : i + 11, j : j + 11, c], y[i : i + 11, j : j + 11, c]
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


def test_ssim_is_the_definition_window_by_window() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 15, 18, 3, generator=g, dtype=torch.float64)
    y = 0.7 * x + 0.3 * y
    assert ssim(x, y) == pytest.approx(brute_force_ssim(x.numpy(), y.numpy()), abs=1e-10)


def test_ssim_of_a_batch_is_the_mean_and_of_equal_images_one() -> None:
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 3, 12, 13, 3, generator=g)
    assert ssim(x, x) == pytest.approx(1.0)
    assert ssim(x, y) == pytest.approx(sum(ssim(a, b) for a, b in zip(x, y, strict=True)) / 3)


def test_an_image_smaller_than_the_window_is_refused() -> None:
    with pytest.raises(ShapeError, match="h, w >= 11"):
        ssim(torch.zeros(10, 20, 3), torch.zeros(10, 20, 3))
