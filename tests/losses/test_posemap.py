"""PoseMap losses: cosine and L2, empty cells, weights of cells."""

from __future__ import annotations

import math

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.losses import posemap_cosine, posemap_l2

LOSSES = [posemap_cosine, posemap_l2]


def _map(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _cells(*vectors: tuple[float, float]) -> torch.Tensor:
    """A map (1, 2, 1, n) whose cells are the given vectors."""
    return torch.tensor(vectors, dtype=torch.float64).T.reshape(1, 2, 1, len(vectors))


def test_cosine_by_hand_is_taken_per_cell_over_channels():
    predicted = _cells((2.0, 0.0), (0.0, 3.0), (1.0, 1.0))
    target = _cells((5.0, 0.0), (0.0, -1.0), (1.0, 0.0))
    expected = (0 + 2 + (1 - math.sqrt(0.5))) / 3
    assert posemap_cosine(predicted, target, epsilon=1e-9).item() == pytest.approx(expected, rel=1e-9)


def test_cosine_equals_the_plain_cosine_of_full_cells():
    predicted, target = _map(0, 2, 64, 3, 4), _map(1, 2, 64, 3, 4)
    plain = 1 - torch.nn.functional.cosine_similarity(predicted, target, dim=1).mean()
    assert posemap_cosine(predicted, target).item() == pytest.approx(plain.item(), rel=1e-5)


def test_l2_by_hand_is_the_mean_over_cells_of_the_norm():
    predicted, target = _cells((3.0, 4.0), (0.0, 1.0)), _cells((0.0, 0.0), (0.0, 0.0))
    assert posemap_l2(predicted, target).item() == pytest.approx(3)
    assert posemap_l2(predicted, target, scale=2).item() == pytest.approx(1.5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_zero_at_equality_also_in_empty_cells(loss, dtype):
    predicted = _map(2, 2, 16, 2, 3, dtype=dtype)
    predicted[0, :, 0, 0] = 0
    predicted.requires_grad_()
    value = loss(predicted, predicted.detach().clone())
    value.backward()
    assert value.item() == 0
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


def test_a_cell_empty_in_one_map_only_has_a_bounded_gradient():
    predicted = torch.zeros(1, 8, 1, 1, requires_grad=True)
    value = posemap_cosine(predicted, torch.ones(1, 8, 1, 1), epsilon=1e-2)
    value.backward()
    assert value.item() == pytest.approx(1, abs=0.01)
    assert 0 < predicted.grad.norm().item() <= 1 / 1e-2


@pytest.mark.parametrize("loss", LOSSES)
def test_posemap_losses_pass_gradcheck(loss):
    predicted, target = _map(3, 2, 4, 2, 2).requires_grad_(), _map(4, 2, 4, 2, 2).requires_grad_()
    weights = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (predicted, target))
    assert torch.autograd.gradcheck(lambda p, t: loss(p, t, weights), (predicted, target))


@pytest.mark.parametrize("loss", LOSSES)
def test_cell_weights_choose_cells(loss):
    predicted, target = _map(6, 1, 4, 1, 2), _map(7, 1, 4, 1, 2)
    only_first = loss(predicted[..., :1], target[..., :1]).item()
    weights = torch.tensor([[[0.3, 0.0]]], dtype=torch.float64)
    assert loss(predicted, target, weights).item() == pytest.approx(only_first)
    assert loss(predicted, target, torch.zeros_like(weights)).item() == 0


def test_small_angles_survive_float32():
    angle = 1e-4  # 1 - cos = 5e-9, below the resolution of 1 - x in float32
    predicted = torch.tensor([math.cos(angle), math.sin(angle)]).view(1, 2, 1, 1)
    target = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    assert posemap_cosine(predicted, target).item() == pytest.approx(angle**2 / 2, rel=0.01)


@pytest.mark.parametrize("loss", LOSSES)
def test_other_shapes_are_refused(loss):
    with pytest.raises(ShapeError, match="B, C, h, w"):
        loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3))
    with pytest.raises(ShapeError, match="cell_weights"):
        loss(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), torch.ones(1, 4))
