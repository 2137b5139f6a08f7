"""Localizers that learn nothing, which every learnt one must beat: the mean training pose and the nearest view.

The nearest view is found by the stronger of what a fixed descriptor can do: on real captures the descriptor below
returns views almost as near as the truly nearest training camera (medians on a 7-Scenes kitchen sequence 9.3 cm,
3.3 deg, where the nearest camera gives 8.7 cm, 3.3 deg). Grey or colour thumbnails from 16x12 to 32x24, blurred or
contrast-normalised, were not better on any of four captures and far worse in a room seen from all sides.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from posemap_fast.checks import expect_dtype, expect_shape
from posemap_fast.data import ImageStack
from posemap_fast.errors import ShapeError
from posemap_fast.eval.metrics import pose_errors, summarize
from posemap_fast.geometry import mean_pose

__all__ = ["image_descriptor", "mean_pose_baseline", "nearest_view_baseline", "nearest_views"]

_COLOUR_SIZE = (6, 8)  # rows, columns of the colour thumbnail
_GRADIENT_SIZE = (96, 128)  # image size at which gradients are taken
_GRADIENT_CELLS = (3, 4)
_N_ORIENTATIONS = 8  # of 45 deg, signed
_LUMINANCE = (0.299, 0.587, 0.114)
_MIN_CELL_NORM = 0.01  # a cell without texture stays weak instead of becoming amplified noise
_PIXELS = 2**24  # described at a time, of whole images; bounds the memory


def mean_pose_baseline(train_c2w: torch.Tensor, test_c2w: torch.Tensor) -> dict[str, Any]:
    """Errors of answering every test view with the mean training pose.

    Args:
        train_c2w: (n, 4, 4), n >= 1.
        test_c2w: (m, 4, 4) true poses.
    Returns:
        As `summarize`.
    """
    expect_shape("mean_pose_baseline", "test_c2w", test_c2w, (None, 4, 4))
    answer = mean_pose(train_c2w.double()).expand(test_c2w.shape[0], 4, 4)
    return summarize(*pose_errors(answer, test_c2w))


def nearest_view_baseline(
    train_images: ImageStack | torch.Tensor,
    train_c2w: torch.Tensor,
    test_images: ImageStack | torch.Tensor,
    test_c2w: torch.Tensor,
) -> dict[str, Any]:
    """Errors of answering every test view with the pose of the training view that looks most alike.

    Args:
        train_images: (n, h, w, 3) uint8, n >= 1.
        train_c2w: (n, 4, 4).
        test_images: (m, h, w, 3) uint8.
        test_c2w: (m, 4, 4) true poses.
    Returns:
        As `summarize`.
    """
    expect_shape("nearest_view_baseline", "train_c2w", train_c2w, (train_images.shape[0], 4, 4))
    answer = train_c2w[nearest_views(train_images, test_images).to(train_c2w.device)]
    return summarize(*pose_errors(answer, test_c2w))


def nearest_views(train_images: ImageStack | torch.Tensor, test_images: ImageStack | torch.Tensor) -> torch.Tensor:
    """Index of the training image with the highest descriptor correlation, for each test image: (m,) int64.

    Raises:
        ShapeError: not (n, h, w, 3) uint8, or no training image.
    """
    if train_images.shape[0] == 0:
        raise ShapeError("nearest_views: train_images must hold at least one image; got none")
    if test_images.shape[0] == 0:
        return torch.zeros(0, dtype=torch.int64)
    return (image_descriptor(test_images) @ image_descriptor(train_images).T).argmax(dim=1)


def image_descriptor(images: ImageStack | torch.Tensor) -> torch.Tensor:
    """What an image looks like, in 240 numbers: where which colour is, and where which edges are.

    Two parts of unit length, so that the product of two descriptors is the sum of two correlations:
        colour   8x6 RGB thumbnail (area mean), mean removed                     144 numbers
        edges    histograms of gradient orientation in 4x3 cells, 8 bins each     96 numbers (Dalal and Triggs 2005)

    Args:
        images: (n, h, w, 3) uint8, any size.
    Returns:
        (n, 240) float32.
    Raises:
        ShapeError: another shape or dtype.
    """
    parts = []
    for chunk in images.split(max(1, _PIXELS // max(1, images.shape[1:3].numel()))):
        expect_shape("image_descriptor", "images", chunk, (None, None, None, 3))
        expect_dtype("image_descriptor", "images", chunk, [torch.uint8])
        parts.append(_describe(chunk.permute(0, 3, 1, 2).float() / 255))
    return torch.cat(parts)


def _describe(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) in [0, 1] -> (n, 240)."""
    colour = F.interpolate(images, size=_COLOUR_SIZE, mode="area").flatten(1)
    colour = colour - colour.mean(dim=1, keepdim=True)
    return torch.cat([F.normalize(colour, dim=1), F.normalize(_edge_histograms(images), dim=1)], dim=1)


def _edge_histograms(images: torch.Tensor) -> torch.Tensor:
    """Gradient magnitude per cell and orientation, shared linearly between the two nearest orientations."""
    weights = torch.tensor(_LUMINANCE, device=images.device)[:, None, None]
    grey = (F.interpolate(images, size=_GRADIENT_SIZE, mode="area") * weights).sum(dim=1, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    along_x = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    along_y = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    magnitude = torch.hypot(along_x, along_y)
    bin_position = torch.atan2(along_y, along_x) / (2 * torch.pi) * _N_ORIENTATIONS
    bins = torch.arange(_N_ORIENTATIONS, device=images.device)[:, None, None]
    half = _N_ORIENTATIONS / 2
    distance = (bin_position - bins + half).remainder(_N_ORIENTATIONS) - half  # (n, bins, 96, 128)
    histograms = F.adaptive_avg_pool2d(magnitude * (1 - distance.abs()).clamp_min(0), _GRADIENT_CELLS)
    return (histograms / (histograms.norm(dim=1, keepdim=True) + _MIN_CELL_NORM)).flatten(1)
