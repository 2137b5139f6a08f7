"""Appearance code of an image from its luminance histogram (NeRF-H of DFNet, arXiv:2204.00559, section 3.2).

The code is a function of the image alone, so it works for images that were never trained on, which is its point.
DFNet looks up an embedding for each bin's rounded percentage; here a small MLP maps the ten fractions, so that
an unseen percentage is interpolated instead of an untrained row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

__all__ = ["N_BINS", "AppearanceEncoder", "luminance_histogram"]

N_BINS = 10
_LUMINANCE = (0.299, 0.587, 0.114)
_ENOUGH_PIXELS = 320 * 240


class Images(Protocol):
    """A tensor, or a stack that reads its images one by one."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[torch.Tensor]: ...


def luminance_histogram(images: Images) -> torch.Tensor:
    """Fractions of pixels in ten equal bins of Y = .299 R + .587 G + .114 B.

    Args:
        images: (n, H, W, 3) uint8, or float in [0, 1]; read one by one. Of large ones every k-th row and column.
    Returns:
        (n, 10) float32, rows sum to 1.
    """
    rows: torch.Tensor | None = None
    for index, image in enumerate(images):
        step = math.ceil(math.sqrt(image.shape[0] * image.shape[1] / _ENOUGH_PIXELS))
        image = image[:: max(1, step), :: max(1, step)]
        scale = 255.0 if image.dtype == torch.uint8 else 1.0
        luminance = (image.float() @ torch.tensor(_LUMINANCE, device=image.device)) / scale
        bins = (luminance * N_BINS).long().clamp_(0, N_BINS - 1)
        row = torch.bincount(bins.flatten(), minlength=N_BINS) / bins.numel()
        rows = row.new_empty(len(images), N_BINS) if rows is None else rows
        rows[index] = row
    return torch.zeros(0, N_BINS) if rows is None else rows


class AppearanceEncoder(nn.Module):
    """(n, 10) histograms -> (n, dim) codes; zero at the mean training histogram before training."""

    mean_histogram: torch.Tensor

    def __init__(self, dim: int, mean_histogram: torch.Tensor, hidden: int = 32):
        super().__init__()
        self.register_buffer("mean_histogram", mean_histogram.detach().float().clone())  # two encoders share no memory
        first, last = nn.Linear(N_BINS, hidden), nn.Linear(hidden, dim)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(first, nn.ReLU(), last)

    def forward(self, histograms: torch.Tensor) -> torch.Tensor:
        """Codes of a batch of histograms; differences of 10 % of the pixels are inputs of order one."""
        return self.layers((histograms - self.mean_histogram) * N_BINS)
