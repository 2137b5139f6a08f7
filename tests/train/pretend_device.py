"""A device that is not there: tensors that compute on the CPU, but must not be mixed with tensors of the CPU.

Whoever builds a tensor without naming a device, or forgets to move one, gets a `MixedDevices` error here, as on a GPU.
The device is called `meta`; inside the block its tensors hold real numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class MixedDevices(AssertionError):
    """Tensors of two devices in one operation."""


class Pretended(torch.Tensor):
    """A tensor on the pretended device; `inner` has its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def _is_pretended(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the inner tensors and wrap what it returns."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, Pretended)]
    named = "device" in kwargs and kwargs["device"] is not None
    to_us = _is_pretended(kwargs.get("device")) if named else bool(ours)
    strangers = [t for t in tensors if not isinstance(t, Pretended) and t.dim() > 0]
    if ours and strangers and func not in _MOVES:
        raise MixedDevices(f"{func}: a tensor of shape {tuple(strangers[0].shape)} is on the CPU, others are not")
    if named:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map(lambda t: t.inner if isinstance(t, Pretended) else t, (args, kwargs))
    out = func(*inner_args, **inner_kwargs)
    known = {id(t.inner): t for t in ours}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Pretended):
            return value
        return known.get(id(value)) if id(value) in known else Pretended(value) if to_us else value

    return tree_map(wrapped, out)


class _Factories(TorchDispatchMode):
    """Catches operations without a pretended argument that name the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """Catches `torch.tensor(numbers, device=...)` and `x.new_tensor(numbers)`, which reach no dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and _is_pretended(kwargs.get("device")):
            return torch.tensor(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretended):
            return torch.tensor(args[1], **{"dtype": args[0].dtype, **kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextlib.contextmanager
def pretended_device() -> Iterator[torch.device]:
    """Yields the device; tensors can be moved to it inside the block."""
    with _Literals(), _Factories():
        yield DEVICE
