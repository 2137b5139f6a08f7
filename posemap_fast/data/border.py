"""The dark frame that undistortion leaves around images: no part of the scene, and a field would build it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from posemap_fast.data.image_stack import ImageStack

__all__ = ["NO_BORDER", "Border", "find_border"]

_WIDEST = 0.05  # of the side; wider frames are not looked for
# A frame's last line is darker than this share of the next but one in this share of the images. Where there is no frame
# (7-Scenes, Mip-NeRF 360, Strecha) that quantile of the ratio is 1.0 and more at every line.
_STEP, _SHARE = 0.9, 0.9
_DARK = 4.0  # grey levels; a line that dark says nothing about the one beside it
_LEAST, _MOST = 8, 64  # images looked at


class Border(NamedTuple):
    """Widths of the frame in pixels."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0

    def inside(self, image: torch.Tensor) -> torch.Tensor:
        """The part of images (..., H, W, C) within the frame, a view."""
        height, width = image.shape[-3:-1]
        return image[..., self.top : height - self.bottom, self.left : width - self.right, :]


NO_BORDER = Border()


def find_border(images: ImageStack) -> Border:
    """The frame that all images (n, H, W, 3) uint8 have in common; none where there are too few to tell.

    A frame ends in a step from dark to bright at the same row or column in nearly every image, whatever that shows. One
    that is a little curved, or blurred by resizing, counts with its innermost line.
    """
    if len(images) < _LEAST:
        return NO_BORDER
    some = torch.arange(0, len(images), max(1, len(images) // _MOST), device=images.device)
    lines = []
    for one in some.split(1):  # images may be large
        grey = images.batch(one)[0].float().mean(dim=-1)  # (H, W)
        lines.append((grey.mean(dim=1), grey.mean(dim=0)))
    rows, cols = (torch.stack(sides) for sides in zip(*lines, strict=True))
    return Border(*(_width(sides) for sides in (rows, rows.flip(1), cols, cols.flip(1))))


def _width(lines: torch.Tensor) -> int:
    """Of the frame at the beginning of lines (m, length): mean grey levels of rows or columns, from the edge on."""
    n = min(max(1, round(_WIDEST * lines.shape[1])), lines.shape[1] - 2)
    if n < 1:
        return 0
    outer, inner = lines[:, :n], lines[:, 2 : n + 2]
    ratio = torch.where(inner > _DARK, outer / inner.clamp(min=_DARK), torch.ones_like(inner))
    steps = torch.nonzero(ratio.quantile(_SHARE, dim=0) < _STEP)
    return int(steps[-1]) + 1 if len(steps) else 0
