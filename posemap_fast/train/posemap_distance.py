"""L_posemap of a network that predicts PoseMaps."""

from __future__ import annotations

import torch

from posemap_fast.apr import PoseMapRefiner
from posemap_fast.losses import posemap_l2

__all__ = ["posemap_distance"]


def posemap_distance(
    refiner: PoseMapRefiner, predicted: torch.Tensor, target: torch.Tensor, *, scale: float, points: float = 1.0
) -> torch.Tensor:
    """How far predicted PoseMaps are from those of the map: their L2, and that of the scene points they show.

    A PoseMap is smooth: what is a small step in it may be a long way in the scene, where the solver needs it.

    Args:
        refiner: of the network, with the readout of the map.
        predicted, target: (B, C, rows, cols).
        scale: typical norm of a PoseMap's cell, as of `posemap_l2`.
        points: weight of the points' distance, in typical distances of a scene point; 0 leaves it out.
    Returns:
        Scalar >= 0, mean over the cells.
    """
    maps = posemap_l2(predicted, target, scale=scale)
    if points == 0:
        return maps
    apart = refiner.readout(predicted) - refiner.readout(target)
    return maps + points * (torch.linalg.vector_norm(apart, dim=-1) / refiner.readout.point_scale).mean()
