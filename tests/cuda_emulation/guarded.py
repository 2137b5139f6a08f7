"""Output buffers between canaries, for kernels that are called with raw pointers."""

from __future__ import annotations

import math

import torch

__all__ = ["Guarded"]

_MARGIN = 64  # elements on each side; keeps a buffer as aligned as its allocation


class Guarded:
    """Hands out buffers that hold nonsense and finds writes around them."""

    def __init__(self) -> None:
        self._wholes: list[tuple[torch.Tensor, torch.Tensor]] = []

    def new(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer of NaN (floats), -77 (signed) or 77 (bytes)."""
        canary, nonsense = (-7.25, math.nan) if dtype.is_floating_point else (42, 77 if dtype == torch.uint8 else -77)
        whole = torch.full((math.prod(shape) + 2 * _MARGIN,), canary, dtype=dtype)
        self._wholes.append((whole, whole.clone()))
        middle = whole[_MARGIN : len(whole) - _MARGIN]
        return middle.fill_(nonsense).view(shape)

    def expect_clean_margins(self) -> None:
        """Every canary is as it was."""
        for whole, before in self._wholes:
            assert torch.equal(whole[:_MARGIN], before[:_MARGIN]), "a kernel wrote in front of its output"
            assert torch.equal(whole[-_MARGIN:], before[-_MARGIN:]), "a kernel wrote behind its output"
