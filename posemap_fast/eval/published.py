"""Median errors that other systems published, to stand beside ours: each with its ground truth and protocol.

Source of all rows: tables 1 and 2 of the PoseMap paper (arXiv:2403.12800), which quotes DFNet (arXiv:2204.00559).
7-Scenes there is scored against the original (DSLAM) poses; against the SfM poses the same methods are about twice as
good, so the two must not be compared. `_dm` and `_ud` adapt on images of the test sequences (transductive).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PUBLISHED", "PublishedResult"]


@dataclass(frozen=True)
class PublishedResult:
    """One method on the scenes of one dataset."""

    method: str
    protocol: str  # inductive or transductive
    ground_truth: str
    medians: dict[str, tuple[float, float]]  # scene -> m, degrees


_SEVEN = ("chess", "fire", "heads", "office", "pumpkin", "redkitchen", "stairs")
_CAMBRIDGE = ("KingsCollege", "OldHospital", "ShopFacade", "StMarysChurch")


def _row(method: str, protocol: str, ground_truth: str, scenes: tuple[str, ...], values: str) -> PublishedResult:
    pairs = [tuple(float(number) for number in pair.split("/")) for pair in values.split()]
    return PublishedResult(method, protocol, ground_truth, dict(zip(scenes, pairs, strict=True)))  # type: ignore[arg-type]


_INDUCT, _TRANS = "inductive", "transductive"
PUBLISHED: dict[str, tuple[PublishedResult, ...]] = {
    "7scenes": (
        _row("DFNet", _INDUCT, "dslam", _SEVEN, ".05/1.88 .17/6.45 .06/3.63 .08/2.48 .10/2.78 .22/5.45 .16/3.29"),
        _row("PMNet", _INDUCT, "dslam", _SEVEN, ".04/1.70 .10/4.51 .07/4.23 .07/1.96 .14/3.33 .14/3.36 .16/3.62"),
        _row("DFNet_dm", _TRANS, "dslam", _SEVEN, ".04/1.48 .04/2.16 .03/1.82 .07/2.01 .09/2.26 .09/2.42 .14/3.31"),
        _row("PMNet_ud", _TRANS, "dslam", _SEVEN, ".03/1.26 .04/1.76 .02/1.68 .06/1.69 .07/1.96 .08/2.23 .11/2.97"),
    ),
    "cambridge": (
        _row("DFNet", _INDUCT, "sfm", _CAMBRIDGE, ".73/2.37 2.00/2.98 .67/2.21 1.37/4.03"),
        _row("PMNet", _INDUCT, "sfm", _CAMBRIDGE, ".68/1.97 1.03/1.31 .58/2.10 1.33/3.73"),
        _row("DFNet_dm", _TRANS, "sfm", _CAMBRIDGE, ".43/.87 .46/.87 .16/.59 .50/1.49"),
        _row("PMNet_ud", _TRANS, "sfm", _CAMBRIDGE, ".31/.55 .44/.79 .17/.86 .31/.96"),
    ),
}
