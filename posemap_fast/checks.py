"""Checks of tensors at public boundaries; messages say where, expected and got."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posemap_fast.errors import ShapeError

__all__ = ["expect_dtype", "expect_same_device", "expect_shape"]


def expect_shape(where: str, name: str, tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """Raise `ShapeError` unless `tensor.shape` matches `shape`; None stands for any size."""
    matches = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        wanted = ", ".join("n" if s is None else str(s) for s in shape)
        raise ShapeError(f"{where}: {name} must have shape ({wanted}); got {tuple(tensor.shape)}")


def expect_dtype(where: str, name: str, tensor: torch.Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise `ShapeError` unless the dtype of `tensor` is one of `dtypes`."""
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d) for d in dtypes)
        raise ShapeError(f"{where}: {name} must be {wanted}; got {tensor.dtype}")


def expect_same_device(where: str, **tensors: torch.Tensor) -> None:
    """Raise `ShapeError` unless all tensors live on one device."""
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ShapeError(f"{where}: all tensors must be on one device; got {listing}")
