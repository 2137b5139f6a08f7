"""Views far from the training cameras: clusters that are there are found, and the order follows from them."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.eval import outlier_order
from posemap_fast.eval.outliers import cluster_centres

CORNERS = torch.tensor([[0.0, 0, 0], [10, 0, 0], [0, 10, 0], [10, 10, 5]], dtype=torch.float64)


def clouds(n: int = 30, seed: int = 0) -> torch.Tensor:
    """(4 n, 3) points around CORNERS, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    points = CORNERS.repeat_interleave(n, dim=0) + 0.3 * torch.randn(4 * n, 3, generator=generator, dtype=torch.float64)
    return points[torch.randperm(4 * n, generator=generator)]


def poses(centres: torch.Tensor) -> torch.Tensor:
    c2w = torch.eye(4, dtype=centres.dtype).repeat(len(centres), 1, 1)
    c2w[:, :3, 3] = centres
    return c2w


@pytest.mark.parametrize("seed", range(5))
def test_separated_clusters_are_found(seed: int) -> None:
    points = clouds(seed=seed)
    centres = cluster_centres(points, 4)
    own = points[torch.cdist(points, CORNERS).argmin(dim=1) == 3].mean(dim=0)
    distance = torch.cdist(CORNERS, centres)
    assert sorted(distance.argmin(dim=1).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(centres[distance[3].argmin()], own)  # a centre is the mean of its cluster


def test_one_cluster_is_the_mean() -> None:
    torch.testing.assert_close(cluster_centres(clouds(), 1)[0], clouds().mean(dim=0))


def test_fewer_points_than_clusters_are_their_own_centres() -> None:
    centres = cluster_centres(CORNERS[:3], 8)
    assert centres.shape == (3, 3)
    assert torch.equal(torch.cdist(CORNERS[:3], centres).amin(dim=1), torch.zeros(3, dtype=torch.float64))


def test_points_that_coincide_leave_no_centre_empty() -> None:
    centres = cluster_centres(torch.ones(5, 3), 3)
    assert torch.equal(centres, torch.ones(3, 3))


def test_clustering_repeats_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    points = torch.rand(80, 3, generator=torch.Generator().manual_seed(2))
    assert torch.equal(cluster_centres(points, 6), cluster_centres(points, 6))
    assert torch.equal(torch.rand(3), expected)


def test_no_point_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least one point"):
        cluster_centres(torch.zeros(0, 3), 8)


def test_order_is_by_the_distance_to_the_nearest_cluster_farthest_first() -> None:
    beside = torch.tensor([[-1.0, 0, 0], [0, 0, 0], [0, 3, 0]])
    test = torch.cat([CORNERS[:3] + beside, torch.tensor([[5.0, 5, 1]])])  # the last is amid the clusters, 7 from each
    assert outlier_order(poses(clouds()), poses(test), n_clusters=4) == [3, 2, 0, 1]
    # Counter-value: to the mean of all cameras the last one is the nearest.
    assert outlier_order(poses(clouds()), poses(test), n_clusters=1) == [2, 0, 1, 3]


def test_equal_distances_keep_the_order_of_the_views() -> None:
    test = torch.tensor([[0.0, 0, 1], [0, 0, 5], [0, 1, 0], [1, 0, 0]])
    assert outlier_order(poses(torch.zeros(1, 3)), poses(test)) == [1, 0, 2, 3]
    assert outlier_order(poses(torch.zeros(1, 3)), poses(test[:0])) == []
