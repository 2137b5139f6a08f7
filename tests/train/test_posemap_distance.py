"""L_posemap of predicted PoseMaps: their L2, and how far apart the scene points are that they show."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.apr import PoseMapRefiner
from posemap_fast.geometry import Camera
from posemap_fast.losses import posemap_l2
from posemap_fast.train.posemap_distance import posemap_distance

CELLS, CHANNELS = (2, 3), 8


@pytest.fixture
def refiner() -> PoseMapRefiner:
    """Its readout gives the first three channels, twice as large."""
    made = PoseMapRefiner(4, 4, CHANNELS, CELLS, Camera(48, 32, 40.0, 40.0, 24.0, 16.0), 4)

    class FirstThree(torch.nn.Module):
        point_scale = torch.tensor([4.0])

        def forward(self, posemaps: torch.Tensor) -> torch.Tensor:
            return 2 * posemaps[:, :3].flatten(2).transpose(1, 2)

    made.readout = FirstThree()
    return made


def maps(seed: int) -> torch.Tensor:
    return torch.randn(2, CHANNELS, *CELLS, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_l2_and_the_distance_of_the_points(refiner: PoseMapRefiner) -> None:
    a, b = maps(0), maps(1)
    points = (2 * (a - b)[:, :3]).norm(dim=1).mean() / 4
    alone = posemap_l2(a, b, scale=3.0)
    assert torch.equal(posemap_distance(refiner, a, b, scale=3.0, points=0.0), alone)
    assert posemap_distance(refiner, a, b, scale=3.0).item() == pytest.approx((alone + points).item(), rel=1e-6)
    weighted = posemap_distance(refiner, a, b, scale=3.0, points=5.0)
    assert weighted.item() == pytest.approx((alone + 5 * points).item(), rel=1e-6)


def test_value_and_gradient_are_zero_at_equality(refiner: PoseMapRefiner) -> None:
    a = maps(0).requires_grad_()
    distance = posemap_distance(refiner, a, a.detach().clone(), scale=1.0)
    distance.backward()
    assert distance == 0 and torch.equal(a.grad, torch.zeros_like(a))


def test_the_points_pull_where_the_scene_is_far_apart(refiner: PoseMapRefiner) -> None:
    """Channels that say nothing of the point get their gradient from the L2 alone."""
    a, b = maps(0), maps(1)
    gradients = []
    for points in (0.0, 1.0):
        leaf = a.clone().requires_grad_()
        posemap_distance(refiner, leaf, b, scale=1.0, points=points).backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0][:, 3:], gradients[1][:, 3:])
    assert ((gradients[1] - gradients[0])[:, :3] * (a - b)[:, :3] > 0).all()
