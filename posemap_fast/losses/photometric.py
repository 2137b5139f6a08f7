"""Losses and the score between rendered and true colours; colours in [0, 1], any leading shape."""

from __future__ import annotations

import torch
from torch.nn import functional

from posemap_fast.errors import ShapeError

__all__ = ["huber", "mse", "nerf_in_the_wild", "psnr"]


def mse(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over all elements (Mildenhall et al. 2020, arXiv:2003.08934, Eq. 6)."""
    _expect_equal("mse", predicted, target)
    return (predicted - target).square().mean()


def huber(predicted: torch.Tensor, target: torch.Tensor, delta: float = 0.1) -> torch.Tensor:
    """Huber loss divided by `delta` (instant-ngp, arXiv:2201.05989): like L1 for |d| >> delta, and smooth at 0.

    d^2 / (2 delta)  if |d| <= delta,  else  |d| - delta / 2;   mean over all elements
    """
    _expect_equal("huber", predicted, target)
    return functional.huber_loss(predicted, target, delta=delta) / delta


def nerf_in_the_wild(
    predicted: torch.Tensor,
    target: torch.Tensor,
    beta: torch.Tensor,
    transient_sigmas: torch.Tensor,
    transient_weight: float = 0.01,
) -> torch.Tensor:
    """Loss under predicted uncertainty (NeRF-W, Martin-Brualla et al. 2021, arXiv:2008.02268, Eq. 13).

        mean((c - c_hat)^2 / (2 beta^2)) + mean(log beta) + transient_weight mean(sigma_transient)

    Args:
        predicted, target: (n_rays, 3).
        beta: (n_rays,) uncertainty, > 0 (bounded from below by the field, 0.1 in DFNet).
        transient_sigmas: (n_samples,) >= 0; may be empty.
    """
    _expect_equal("nerf_in_the_wild", predicted, target)
    if beta.shape != predicted.shape[:-1]:
        raise ShapeError(
            f"nerf_in_the_wild: beta must have shape {tuple(predicted.shape[:-1])}; got {tuple(beta.shape)}"
        )
    colour = ((predicted - target).square() / (2 * beta.square()[..., None])).mean()
    density = transient_sigmas.mean() if transient_sigmas.numel() else transient_sigmas.sum()
    return colour + beta.log().mean() + transient_weight * density


def psnr(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, -10 log10(mse), for a peak of 1; infinite for equal images."""
    return -10 * torch.log10(mse(predicted, target))


def _expect_equal(where: str, predicted: torch.Tensor, target: torch.Tensor) -> None:
    if predicted.shape != target.shape or predicted.numel() == 0:
        raise ShapeError(
            f"{where}: both inputs must have one shape, not empty; got {tuple(predicted.shape)} "
            f"and {tuple(target.shape)}"
        )
