"""Memory for large results on the CPU, used again as soon as no tensor holds it.

A fresh block of some MB costs a page fault and the clearing of each page, which for the kernels here is as much as the
work they do in it; malloc gives such blocks back to the system at every free. Here they stay mapped, in huge pages
where the system has them. torch's own caching allocator does the same for a GPU.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Sequence

import torch

__all__ = ["Pool", "empty"]

_SMALLEST = 1 << 20  # bytes; malloc keeps smaller blocks by itself
_UNUSED = 1 << 29  # bytes that may lie idle
_GRAIN = 2 << 20  # a huge page


class Pool:
    """Blocks of anonymous memory; one is free when nothing but the pool refers to it.

    Args:
        unused: bytes of free blocks that a new block leaves; beyond it those go that were not used for longest.
    """

    def __init__(self, unused: int = _UNUSED):
        self._unused = unused
        self._blocks: list[mmap.mmap] = []  # least recently used first
        self._lock = threading.Lock()

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised contiguous CPU tensor; its memory returns to the pool when its last view is gone."""
        count = math.prod(shape)
        block = self._take(count * dtype.itemsize)
        return torch.frombuffer(block, dtype=dtype, count=count).view(*shape)  # holds a reference to the block

    def _take(self, size: int) -> mmap.mmap:
        with self._lock:
            free = self._free()
            fitting = [b for b in free if size <= len(b) <= 2 * size]
            if fitting:
                block = min(fitting, key=len)
                self._blocks.remove(block)
            else:
                self._drop(free)
                block = _map(size)
            self._blocks.append(block)
            return block

    def _free(self) -> list[mmap.mmap]:
        # Without tensors a block is held by the list, the loop variable and the argument of getrefcount.
        return [block for block in self._blocks if sys.getrefcount(block) == 3]

    def _drop(self, free: list[mmap.mmap]) -> None:
        idle = sum(map(len, free))
        for block in free:
            if idle <= self._unused:
                return
            idle -= len(block)
            self._blocks.remove(block)

    def __len__(self) -> int:
        return len(self._blocks)


def _map(size: int) -> mmap.mmap:
    rounded = -(-size // _GRAIN) * _GRAIN
    block = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private: a forked child has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_pool = Pool()


def empty(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """As `like.new_empty(shape)`: dtype and device of `like`, uninitialised; subclasses (fake tensors) make theirs."""
    plain = type(like) is torch.Tensor or type(like) is torch.nn.Parameter
    if not plain or like.device.type != "cpu" or math.prod(shape) * like.itemsize < _SMALLEST:
        return like.new_empty(shape)
    return _pool.tensor(shape, like.dtype)
