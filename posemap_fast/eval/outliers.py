"""Test views far from the training cameras (paper, table 4): where a localizer has to generalise."""

from __future__ import annotations

import torch

from posemap_fast.errors import ShapeError

__all__ = ["cluster_centres", "outlier_order"]

_ROUNDS = 50  # of Lloyd's algorithm; a few hundred positions settle in about ten


def outlier_order(train_c2w: torch.Tensor, test_c2w: torch.Tensor, n_clusters: int = 8) -> list[int]:
    """Indices of the test views by distance to the nearest cluster centre of the training positions, farthest first.

    The paper clusters the training positions and calls this the outlier distance (section 4.3); it does not say into
    how many.

    Args:
        train_c2w: (n, 4, 4), n >= 1.
        test_c2w: (m, 4, 4).
    """
    centres = cluster_centres(train_c2w[:, :3, 3].double(), n_clusters)
    distance = torch.cdist(test_c2w[:, :3, 3].double(), centres).amin(dim=1)
    return distance.argsort(descending=True, stable=True).tolist()


def cluster_centres(points: torch.Tensor, n_clusters: int) -> torch.Tensor:
    """k-means: (n, 3) -> (k, 3) with k = min(n_clusters, n); begins with points far from each other, so it repeats.

    Raises:
        ShapeError: no point.
    """
    if len(points) == 0:
        raise ShapeError("cluster_centres: needs at least one point; got none")
    chosen = [int((points - points.mean(dim=0)).norm(dim=1).argmin())]
    while len(chosen) < min(n_clusters, len(points)):
        chosen.append(int(torch.cdist(points, points[chosen]).amin(dim=1).argmax()))
    centres = points[chosen].clone()
    for _ in range(_ROUNDS):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        moved = torch.stack(
            [points[nearest == k].mean(dim=0) if (nearest == k).any() else c for k, c in enumerate(centres)]
        )
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
