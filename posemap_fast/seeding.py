"""Randomness as a pure function of (seed, stream, step).

No generator lives across steps: a run that was killed and resumed at step k draws what the
uninterrupted run drew at step k, without any generator state in the checkpoint.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["integers", "step_generator", "stream_seed", "uniform"]


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """63-bit seed hashed from the run's seed, the consumer's name and the step."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A fresh CPU generator for one consumer at one step; `uniform` and `integers` draw from it."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, step))


def uniform(generator: torch.Generator, *shape: int, device: torch.device) -> torch.Tensor:
    """Numbers in [0, 1) on `device`. They are drawn on the CPU, so that every device gets the same ones."""
    return torch.rand(shape, generator=generator).to(device, non_blocking=True)


def integers(generator: torch.Generator, high: int, n: int, device: torch.device) -> torch.Tensor:
    """(n,) int64 in [0, high) on `device`, drawn on the CPU."""
    return torch.randint(high, (n,), generator=generator).to(device, non_blocking=True)
