"""Random photometric changes of training images: what another hour, another camera or a passer-by does to a view.

Only brightness, colour, sharpness, noise and erasing (Zhong et al. 2020, arXiv:1708.04896). Never geometry: a flip,
a crop or a turn is the view of another camera, so the pose label would be wrong.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.seeding import uniform

__all__ = ["AugmentConfig", "augment_images"]

_LARGEST = {"gamma": 2.0, "blur_px": 50.0, "erase": 0.5}  # 1 for the others; half an image is the least to regress from
_DRAWS = (1, 1, 1, 3, 1, 1, 4)  # numbers per image: gain, contrast, gamma, colour, blur, noise, rectangle
_GREY = 0.5
_DARKEST = 1e-4  # below an 8-bit step; the slope of x ** gamma at 0 is infinite for gamma < 1
_LEAST_UNIFORM = 2.0**-24  # the normal quantile of 0 is infinite
_LEAST_SIGMA = 1e-3  # px; a Gaussian this narrow is the identity in float32 and float64


@dataclass(frozen=True)
class AugmentConfig:
    """Ranges, drawn uniformly per image; 0 switches a change off, and all are off by default."""

    gain: float = 0.0  # image times a factor in 1 +- gain; 0 to 1
    contrast: float = 0.0  # distance to the image's mean times a factor in 1 +- contrast; 0 to 1
    gamma: float = 0.0  # image to the power exp(u), u in +- gamma; 0 to 2
    colour: float = 0.0  # each channel times a factor of its own in 1 +- colour; 0 to 1
    blur_px: float = 0.0  # px of the input, largest standard deviation of a Gaussian blur; 0 to 50
    noise: float = 0.0  # largest standard deviation of normal noise, image range 0 to 1; 0 to 1
    erase: float = 0.0  # largest share of the area under one grey rectangle; 0 to 0.5

    def __post_init__(self) -> None:
        for item in fields(self):
            value, top = getattr(self, item.name), _LARGEST.get(item.name, 1.0)
            if not 0 <= value <= top:  # NaN too
                raise ConfigError(f"augment: {item.name} must be in [0, {top:g}]; got {value}; 0 switches it off")

    @property
    def is_off(self) -> bool:
        """Whether nothing would change."""
        return not any(astuple(self))


def augment_images(images: torch.Tensor, config: AugmentConfig, generator: torch.Generator) -> torch.Tensor:
    """Images changed at random, each in its own way: gain and colour, contrast, gamma, blur, noise, rectangle.

    Convention: one block of draws per call serves all changes, and noise is drawn after it, so switching one change
    on or off leaves the numbers of the others as they were.
    Args:
        images: (B, 3, H, W) float in [0, 1].
        config: ranges.
        generator: on the CPU (`seeding.step_generator`); nothing is drawn from it when all ranges are 0.
    Returns:
        Same shape, dtype, device and memory format, in [0, 1]; the very object when all ranges are 0.
    Raises:
        ShapeError: wrong shape, or not float.
    Differentiable in images, except where clamped or erased. Cost: no host sync; noise copies B 3 H W numbers to the
    device, and the blur is two banded matrix products, H + W multiply-adds per value.
    """
    expect_shape("augment_images", "images", images, (None, 3, None, None))
    if not images.is_floating_point():
        raise ShapeError(f"augment_images: images must be float in [0, 1]; got {images.dtype}: divide by 255 first")
    if config.is_off:
        return images
    draws = uniform(generator, len(images), sum(_DRAWS), device=images.device).to(images.dtype)
    gain, contrast, gamma, colour, blur, noise, box = draws[..., None, None].split(_DRAWS, dim=1)  # (B, n, 1, 1) each

    x = images
    if config.gain > 0 or config.colour > 0:
        x = x * _spread(gain, config.gain).add(1) * _spread(colour, config.colour).add(1)
    if config.contrast > 0:
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        x = mean + (x - mean) * _spread(contrast, config.contrast).add(1)
    if config.gamma > 0:
        x = x.clamp(_DARKEST, 1).pow(_spread(gamma, config.gamma).exp())
    if config.blur_px > 0:
        x = _blurred(x, blur * config.blur_px)
    if config.noise > 0:
        x = x + noise * config.noise * _normal(generator, x)
    if config.erase > 0:
        x = x.masked_fill(_rectangle(box, config.erase, x), _GREY)
    is_last = images.is_contiguous(memory_format=torch.channels_last)
    return x.clamp(0, 1).contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def _spread(draws: torch.Tensor, range_: float) -> torch.Tensor:
    """[0, 1) -> [-range, range)."""
    return (2 * draws - 1) * range_


def _normal(generator: torch.Generator, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers of `like`'s shape, within 5.4 standard deviations (quantiles of 24-bit uniforms)."""
    draws = uniform(generator, *like.shape, device=like.device).clamp(_LEAST_UNIFORM, 1 - _LEAST_UNIFORM)
    return (math.sqrt(2) * torch.erfinv(2 * draws - 1)).to(like.dtype)


def _blurred(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, sigma (B, 1, 1, 1) in px; at the borders the weights inside the image are scaled to sum to 1."""
    return _gaussian(x.shape[2], sigma) @ x @ _gaussian(x.shape[3], sigma).transpose(2, 3)


def _gaussian(n: int, sigma: torch.Tensor) -> torch.Tensor:
    """(B, 1, n, n) blur along one axis; rows sum to 1."""
    position = torch.arange(n, device=sigma.device, dtype=sigma.dtype)
    distance = (position[:, None] - position) / sigma.clamp(min=_LEAST_SIGMA)  # (B, 1, n, n)
    return torch.softmax(-0.5 * distance.square(), dim=-1)


def _rectangle(draws: torch.Tensor, largest: float, like: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) bool mask of one rectangle per image, of at most the share `largest`, from draws (B, 4, 1, 1).

    The share of the area is uniform; the sides, as shares of the image's, stand to each other as 1:2 to 2:1.
    """
    height, width = like.shape[2:]
    share, shape, top, left = draws.unbind(dim=1)  # (B, 1, 1) each
    area, ratio = share * largest, 4 ** (shape - 0.5)
    n_rows, n_columns = ((area * ratio).sqrt() * height).floor(), ((area / ratio).sqrt() * width).floor()
    rows = torch.arange(height, device=like.device)[:, None] - (top * (height - n_rows + 1)).floor()  # (B, H, 1)
    columns = torch.arange(width, device=like.device) - (left * (width - n_columns + 1)).floor()  # (B, 1, W)
    return ((rows >= 0) & (rows < n_rows) & (columns >= 0) & (columns < n_columns))[:, None]
