"""Loss of predicted error sizes: the expected error as the scale of a Laplace distribution."""

from __future__ import annotations

import torch

from posemap_fast.errors import ShapeError

__all__ = ["laplace_nll"]

_LIMIT = 12.0  # |log sigma| beyond which the loss does not follow: exp(12) = 160 000


def laplace_nll(errors: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of errors under Laplace scales (Kendall and Gal 2017, arXiv:1703.04977, Eq. 5).

        e / sigma + log sigma,   smallest where sigma is the mean error given the input

    Args:
        errors: any shape, >= 0, not empty; no gradient is sent to them.
        log_sigma: same shape.
    """
    if errors.shape != log_sigma.shape or errors.numel() == 0:
        raise ShapeError(
            f"laplace_nll: errors and log_sigma must have one shape, not empty; got {tuple(errors.shape)} "
            f"and {tuple(log_sigma.shape)}"
        )
    bounded = log_sigma.clamp(-_LIMIT, _LIMIT)
    return (errors.detach() * torch.exp(-bounded) + bounded).mean()
