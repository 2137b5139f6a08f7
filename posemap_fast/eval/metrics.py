"""Pose errors and their summary; image similarity.

Pose convention: c2w, OpenCV axes. Both errors are unchanged if the camera axes of both poses are turned alike, so
poses in OpenGL axes give the same numbers as long as prediction and truth agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.geometry import check_rigid, rotation_angle_deg

__all__ = ["RECALL_THRESHOLDS", "pose_errors", "psnr_db", "ssim", "summarize"]

RECALL_THRESHOLDS: dict[str, tuple[float, float]] = {  # name -> (m, deg); a view counts when both are within
    "0.05m_5deg": (0.05, 5.0),
    "0.25m_2deg": (0.25, 2.0),
    "0.5m_5deg": (0.5, 5.0),
    "5m_10deg": (5.0, 10.0),
}
_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004
_K1, _K2 = 0.01, 0.03


def pose_errors(pred_c2w: torch.Tensor, gt_c2w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of camera centres and angle between rotations, per view.

        t_err = |t_pred - t_gt|,   r_err = 2 acos |<q_pred, q_gt>|

    Args:
        pred_c2w: (n, 4, 4) any float dtype; an entry with NaN or infinity is a missing answer.
        gt_c2w: (n, 4, 4) finite rigid poses in the same world frame.
    Returns:
        t_err_m (n,) float64 in the unit of the poses, r_err_deg (n,) float64 in [0, 180]; both inf where the
        answer is missing.
    Raises:
        ShapeError: shapes differ, or the truth is not rigid.
    """
    expect_shape("pose_errors", "gt_c2w", gt_c2w, (None, 4, 4))
    expect_shape("pose_errors", "pred_c2w", pred_c2w, (gt_c2w.shape[0], 4, 4))
    check_rigid("pose_errors: gt_c2w", gt_c2w)
    pred, truth = pred_c2w.detach().double().cpu(), gt_c2w.detach().double().cpu()
    is_missing = ~torch.isfinite(pred).all(dim=(-2, -1))
    t_err = torch.linalg.vector_norm(pred[:, :3, 3] - truth[:, :3, 3], dim=-1)
    r_err = rotation_angle_deg(pred[:, :3, :3], truth[:, :3, :3])
    return t_err.masked_fill(is_missing, math.inf), r_err.masked_fill(is_missing, math.inf)


def summarize(t_err_m: torch.Tensor, r_err_deg: torch.Tensor) -> dict[str, Any]:
    """Medians, means and recall of pose errors; a missing answer (inf) counts as wrong everywhere.

    The median of an even number of views is the mean of the two in the middle. With no view the errors are NaN.

    Args:
        t_err_m, r_err_deg: (n,), as `pose_errors` returns them.
    Returns:
        {"n_test", "median_t_m", "median_r_deg", "mean_t_m", "mean_r_deg", "recall": {"0.05m_5deg": ...}},
        recall as a fraction in [0, 1].
    Raises:
        ShapeError: shapes differ, or NaN among the errors.
    """
    expect_shape("summarize", "t_err_m", t_err_m, (None,))
    expect_shape("summarize", "r_err_deg", r_err_deg, (t_err_m.shape[0],))
    t, r = t_err_m.double(), r_err_deg.double()
    if bool(torch.isnan(t).any() or torch.isnan(r).any()):
        raise ShapeError("summarize: errors must not be NaN; give inf for a missing answer")
    recall = {
        name: float(((t <= metres) & (r <= degrees)).double().mean())
        for name, (metres, degrees) in RECALL_THRESHOLDS.items()
    }
    return {
        "n_test": t.shape[0],
        "median_t_m": _median(t),
        "median_r_deg": _median(r),
        "mean_t_m": float(t.mean()),
        "mean_r_deg": float(r.mean()),
        "recall": recall,
    }


def _median(values: torch.Tensor) -> float:
    """Mean of the two middle values; inf only when one of them is."""
    n = values.shape[0]
    if n == 0:
        return math.nan
    ordered = values.sort().values
    return float(ordered[n // 2] if n % 2 else (ordered[n // 2 - 1] + ordered[n // 2]) / 2)


def psnr_db(pred: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two images in [0, 1] (any equal shape): -10 log10(mean squared error).

    Values outside [0, 1] are clamped, as a display would. Equal images give inf.

    Raises:
        ShapeError: shapes differ.
    """
    expect_shape("psnr_db", "pred", pred, tuple(truth.shape))
    mse = float(((pred.double().clamp(0, 1) - truth.double().clamp(0, 1)) ** 2).mean())
    return math.inf if mse == 0 else -10 * math.log10(mse)


def ssim(pred: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean structural similarity (Wang et al., IEEE TIP 2004): Gaussian window 11x11, sigma 1.5, K = (.01, .03).

    Computed per channel on whole windows only (no padding), then averaged over windows, channels and images.

    Args:
        pred, truth: (h, w, 3) or (n, h, w, 3) float in [0, 1]; h, w >= 11.
    Returns:
        Similarity in [-1, 1]; 1 for equal images.
    Raises:
        ShapeError: shapes differ or an image is smaller than the window.
    """
    expect_shape("ssim", "pred", pred, tuple(truth.shape))
    if truth.dim() not in (3, 4) or min(truth.shape[-3:-1]) < _WINDOW:
        raise ShapeError(f"ssim: images must be (h, w, c) or (n, h, w, c), h, w >= {_WINDOW}; got {tuple(truth.shape)}")
    x, y = (image.double().clamp(0, 1).reshape(-1, *truth.shape[-3:]).permute(0, 3, 1, 2) for image in (pred, truth))
    mean_x, mean_y = _smooth(x), _smooth(y)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(y * y) - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((numerator / denominator).mean())


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Gaussian-weighted mean of each whole window: (n, c, h, w) -> (n, c, h-10, w-10)."""
    offsets = torch.arange(_WINDOW, dtype=images.dtype, device=images.device) - _WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    n, c, h, w = images.shape
    rows = F.conv2d(images.reshape(n * c, 1, h, w), weights[None, None, :, None])
    return F.conv2d(rows, weights[None, None, None, :]).reshape(n, c, h - _WINDOW + 1, w - _WINDOW + 1)
