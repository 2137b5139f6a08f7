"""Randomness as a pure function of (seed, stream, step).

No generator lives across steps: a run that was killed and resumed at step k draws what the
uninterrupted run drew at step k, without any generator state in the checkpoint.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = ["step_generator", "stream_seed"]


def stream_seed(seed: int, stream: str, step: int = 0) -> int:
    """63-bit seed hashed from the run's seed, the consumer's name and the step."""
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A fresh CPU generator for one consumer at one step (draw on the CPU, then move)."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, step))
