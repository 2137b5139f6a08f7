"""Scores: pose errors, baselines, trajectories, and the report page."""

from __future__ import annotations

from posemap_fast.eval.baselines import mean_pose_baseline, nearest_view_baseline, nearest_views
from posemap_fast.eval.calibration import Calibration, KnownScores, Reliability, calibrate, reliability, widest
from posemap_fast.eval.metrics import RECALL_THRESHOLDS, pose_errors, psnr_db, ssim, summarize
from posemap_fast.eval.outliers import outlier_order
from posemap_fast.eval.pictures import pca_image
from posemap_fast.eval.published import PUBLISHED, PublishedResult
from posemap_fast.eval.report import write_report
from posemap_fast.eval.report_data import ReportData, ViewPicture, WorstCase
from posemap_fast.eval.trajectory import Trajectory, evaluate_files, read_trajectory, write_named, write_tum

__all__ = [
    "PUBLISHED",
    "RECALL_THRESHOLDS",
    "Calibration",
    "KnownScores",
    "PublishedResult",
    "Reliability",
    "ReportData",
    "Trajectory",
    "ViewPicture",
    "WorstCase",
    "calibrate",
    "evaluate_files",
    "mean_pose_baseline",
    "nearest_view_baseline",
    "nearest_views",
    "outlier_order",
    "pca_image",
    "pose_errors",
    "psnr_db",
    "read_trajectory",
    "reliability",
    "ssim",
    "summarize",
    "widest",
    "write_named",
    "write_report",
    "write_tum",
]
