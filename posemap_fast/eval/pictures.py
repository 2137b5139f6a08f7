"""Pictures for people: PoseMaps as colours, differences, and images embedded in a page."""

from __future__ import annotations

import base64

import cv2
import numpy as np
import torch

from posemap_fast.checks import expect_shape

__all__ = ["as_uint8", "difference_image", "jpeg_uri", "pca_image", "png_uri"]

_JPEG_QUALITY = 92
_DIFFERENCE_GAIN = 4.0  # a difference of 1/4 of the range is shown white
_PERCENTILES = (0.01, 0.99)  # outliers may not eat the colour range
_MAX_CELLS = 200_000  # cells that the percentiles are taken from; torch.quantile has a limit


def pca_image(posemaps: torch.Tensor) -> torch.Tensor:
    """PoseMaps as colours: the three strongest joint principal components become red, green and blue.

    One PCA over all cells of all maps, so equal colours mean equal features in every picture. The sign of a
    component, which a PCA leaves open, makes its largest entry positive.

    Args:
        posemaps: (n, C, h, w), any n and C >= 1; cells with NaN or infinity become black.
    Returns:
        (n, h, w, 3) float32 in [0, 1].
    Raises:
        ShapeError: not four dimensions.
    """
    expect_shape("pca_image", "posemaps", posemaps, (None, None, None, None))
    n, channels, h, w = posemaps.shape
    cells = posemaps.detach().double().cpu().permute(0, 2, 3, 1).reshape(-1, channels)
    is_finite = torch.isfinite(cells).all(dim=1)
    picture = torch.zeros(cells.shape[0], 3, dtype=torch.float64)
    good = cells[is_finite]
    if good.shape[0] > 0:
        centred = good - good.mean(dim=0)
        axes = _principal_axes(centred.T @ centred)
        picture[is_finite, : axes.shape[1]] = _stretch(centred @ axes)
    return picture.reshape(n, h, w, 3).float()


def _principal_axes(scatter: torch.Tensor) -> torch.Tensor:
    """Up to three eigenvectors of the largest eigenvalues, in columns, largest first, with a fixed sign."""
    axes = torch.linalg.eigh(scatter).eigenvectors.flip(1)[:, :3]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)


def _stretch(values: torch.Tensor) -> torch.Tensor:
    """Each column between its percentiles mapped to [0, 1]; a constant column becomes 1/2."""
    sample = values[:: max(1, values.shape[0] // _MAX_CELLS)]
    low, high = torch.quantile(sample, torch.tensor(_PERCENTILES, dtype=values.dtype), dim=0)
    span = high - low
    is_flat = span <= 1e-12 * values.abs().amax().clamp_min(1e-30)
    stretched = ((values - low) / torch.where(is_flat, torch.ones_like(span), span)).clamp(0, 1)
    return torch.where(is_flat, torch.full_like(stretched, 0.5), stretched)


def difference_image(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| amplified four times, for looking: two (h, w, 3) images -> (h, w, 3) float32 in [0, 1]."""
    return ((_as_float(a) - _as_float(b)).abs() * _DIFFERENCE_GAIN).clamp(0, 1)


def as_uint8(image: torch.Tensor | np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8 from uint8, or from floats in [0, 1] (clamped; NaN becomes 0)."""
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.dtype == np.uint8:
        return array
    return (np.nan_to_num(array.astype(np.float64)).clip(0, 1) * 255).round().astype(np.uint8)


def jpeg_uri(image: torch.Tensor | np.ndarray) -> str:
    """An RGB image (h, w, 3) as a `data:` address, JPEG: photographs and renders."""
    return _encode(image, ".jpg", "image/jpeg", [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])


def png_uri(image: torch.Tensor | np.ndarray) -> str:
    """An RGB image (h, w, 3) as a `data:` address, PNG: small maps whose cells must stay sharp."""
    return _encode(image, ".png", "image/png", [])


def _as_float(image: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(as_uint8(image).copy()).float() / 255


def _encode(image: torch.Tensor | np.ndarray, suffix: str, mime: str, options: list[int]) -> str:
    ok, data = cv2.imencode(suffix, np.ascontiguousarray(as_uint8(image)[..., ::-1]), options)
    assert ok, f"OpenCV cannot write {suffix}"
    return f"data:{mime};base64,{base64.b64encode(data.tobytes()).decode()}"
