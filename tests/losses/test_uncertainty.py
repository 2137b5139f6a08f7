"""The loss of predicted error sizes: where its minimum lies, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.losses import laplace_nll


def test_value_by_hand() -> None:
    errors = torch.tensor([[0.0, 2.0]])
    log_sigma = torch.tensor([[1.0, math.log(4.0)]])
    assert float(laplace_nll(errors, log_sigma)) == pytest.approx((1.0 + 2 / 4 + math.log(4.0)) / 2)


def test_the_minimum_is_at_the_mean_error() -> None:
    errors = torch.rand(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square()
    log_sigma = errors.mean().log().requires_grad_()
    laplace_nll(errors, log_sigma.expand(500)).backward()
    assert float(log_sigma.grad.abs()) < 1e-12
    with torch.no_grad():
        lowest, *others = (float(laplace_nll(errors, (log_sigma + s).expand(500))) for s in (0, -0.5, -1e-3, 1e-3, 0.5))
    assert min(others) > lowest


def test_no_gradient_goes_to_the_errors() -> None:
    errors = torch.rand(4, 2, requires_grad=True)
    log_sigma = torch.zeros(4, 2, requires_grad=True)
    laplace_nll(errors, log_sigma).backward()
    assert errors.grad is None
    torch.testing.assert_close(log_sigma.grad, (1 - errors.detach()) / 8)


def test_gradient_agrees_with_finite_differences() -> None:
    errors = torch.rand(3, 2, dtype=torch.float64)
    log_sigma = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: laplace_nll(errors, s), (log_sigma,))


@pytest.mark.parametrize("log_sigma", [-1e30, -200.0, 200.0, 1e30])
@pytest.mark.parametrize("error", [0.0, 1e-30, 1e6])
def test_value_and_gradient_are_finite_at_the_extremes(error: float, log_sigma: float) -> None:
    predicted = torch.tensor([log_sigma], requires_grad=True)
    value = laplace_nll(torch.tensor([error]), predicted)
    value.backward()
    assert math.isfinite(float(value.detach())) and bool(predicted.grad.isfinite().all())


@pytest.mark.parametrize(("errors", "log_sigma"), [((3, 2), (3, 1)), ((3,), (3, 2)), ((0, 2), (0, 2))])
def test_shapes_must_agree_and_hold_something(errors, log_sigma) -> None:
    with pytest.raises(ShapeError, match="must have one shape, not empty"):
        laplace_nll(torch.zeros(errors), torch.zeros(log_sigma))
