"""Pose and photometric losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.losses import huber, mse, nerf_in_the_wild, pose_l2, pose_mse, psnr


def _vectors(seed: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _residual(**entries: float) -> torch.Tensor:
    """One 12-vector that is zero but for the given entries, named e0 .. e11."""
    vector = torch.zeros(1, 12, dtype=torch.float64)
    for name, value in entries.items():
        vector[0, int(name[1:])] = value
    return vector


def test_pose_l2_is_the_mean_over_the_batch_of_the_vector_norm():
    predicted = torch.cat([_residual(e0=3.0, e5=4.0), _residual(e3=1.0)])
    assert pose_l2(predicted, torch.zeros(2, 12, dtype=torch.float64)).item() == pytest.approx((5 + 1) / 2)


def test_pose_mse_is_the_mean_over_batch_and_entries():
    predicted = torch.cat([_residual(e0=3.0, e5=4.0), _residual(e3=1.0)])
    assert pose_mse(predicted, torch.zeros(2, 12, dtype=torch.float64)).item() == pytest.approx(26 / 24)


def test_convention_translation_stands_at_3_7_11_and_the_weights_multiply_entries():
    translation, rotation = _residual(e3=1.0, e7=2.0, e11=2.0), _residual(e0=3.0, e10=4.0)
    zero = torch.zeros(1, 12, dtype=torch.float64)
    assert pose_l2(translation, zero, translation_weight=10, rotation_weight=0).item() == pytest.approx(30)
    assert pose_l2(rotation, zero, translation_weight=0, rotation_weight=2).item() == pytest.approx(10)
    assert pose_mse(translation, zero, translation_weight=10, rotation_weight=0).item() == pytest.approx(900 / 12)


@pytest.mark.parametrize("loss", [pose_l2, pose_mse])
def test_pose_losses_pass_gradcheck(loss):
    predicted = _vectors(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, _vectors(1), 0.5, 2.0), (predicted,))


@pytest.mark.parametrize("loss", [pose_l2, pose_mse])
def test_pose_losses_and_their_gradients_are_zero_at_equality(loss):
    predicted = _vectors(0).requires_grad_()
    value = loss(predicted, predicted.detach().clone())
    value.backward()
    assert value.item() == 0
    assert torch.equal(predicted.grad, torch.zeros_like(predicted))


@pytest.mark.parametrize("shape", [(12,), (2, 11), (0, 12), (2, 3, 4)])
def test_pose_losses_refuse_other_shapes(shape):
    with pytest.raises(ShapeError, match=r"\(B, 12\)"):
        pose_l2(torch.zeros(shape), torch.zeros(shape))


def test_mse_and_psnr_by_hand():
    predicted, target = torch.tensor([0.1, 0.5]), torch.tensor([0.0, 0.5])
    assert mse(predicted, target).item() == pytest.approx(0.005)
    assert psnr(predicted, target).item() == pytest.approx(-10 * math.log10(0.005), rel=1e-5)
    assert psnr(target, target).item() == math.inf


def test_huber_is_quadratic_inside_delta_and_linear_outside():
    zero = torch.zeros(1, dtype=torch.float64)
    assert huber(zero + 0.05, zero).item() == pytest.approx(0.05**2 / 0.2)
    assert huber(zero + 0.4, zero).item() == pytest.approx(0.4 - 0.05)
    assert huber(zero + 0.1, zero).item() == pytest.approx(0.05)


def test_colour_losses_refuse_to_broadcast():
    with pytest.raises(ShapeError, match="one shape"):
        mse(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ShapeError, match="one shape"):
        huber(torch.zeros(0, 3), torch.zeros(0, 3))


def test_nerf_in_the_wild_by_hand_and_without_transient_samples():
    predicted, target = torch.tensor([[0.2, 0.0, 0.0]]), torch.zeros(1, 3)
    beta = torch.tensor([0.5])
    expected = 0.04 / (2 * 0.25) / 3 + math.log(0.5)
    assert nerf_in_the_wild(predicted, target, beta, torch.zeros(0)).item() == pytest.approx(expected, rel=1e-5)
    with_density = nerf_in_the_wild(predicted, target, beta, torch.tensor([1.0, 3.0]))
    assert with_density.item() == pytest.approx(expected + 0.02, rel=1e-5)


def test_photometric_losses_pass_gradcheck():
    generator = torch.Generator().manual_seed(2)
    predicted, target = torch.rand(2, 4, 3, generator=generator, dtype=torch.float64)
    beta = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    sigmas = torch.rand(5, generator=generator, dtype=torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (predicted.clone(), beta, sigmas))
    assert torch.autograd.gradcheck(lambda p, b, s: nerf_in_the_wild(p, target, b, s), inputs)
    assert torch.autograd.gradcheck(lambda p: huber(p, target), inputs[:1])
    assert torch.autograd.gradcheck(lambda p: mse(p, target), inputs[:1])
