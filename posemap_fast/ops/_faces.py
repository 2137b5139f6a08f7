"""Calls native kernels: which compiled library a tensor's op runs on, and the C calling convention.

A face is one compiled form of all kernels. Its functions are named `pmf_<kernel>_<device>_<dtype>` and take the same
arguments on every device but for the end: the CPU face gets the number of threads, the CUDA face scratch memory where a
kernel asks for it and the current stream of the tensor's device. No face (`face_of` is None) means: run the reference.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from posemap_fast.errors import BackendError
from posemap_fast.ops import _library

__all__ = ["Face", "converted", "cpu_face", "face_of", "use_face"]

_SUFFIX = {torch.float32: "f32", torch.float64: "f64"}
_STATUS = {1: "impossible sizes", 2: "out of memory", 3: "an index must be sorted and name existing rows"}
_CUDA_ERROR = 1000  # PMF_CUDA_ERROR_BASE
_forced: ContextVar[Face | None] = ContextVar("posemap_fast_face", default=None)


@dataclass(frozen=True)
class Face:
    """The kernels of one library."""

    device: str  # "cpu" or "cuda", as in the functions' names
    handle: ctypes.CDLL

    def call(self, kernel: str, like: torch.Tensor, *arguments: object) -> None:
        """Run `kernel` for the dtype and on the device of `like`."""
        self.run(f"pmf_{kernel}_{self.device}_{_SUFFIX[like.dtype]}", like, *arguments)

    def run(self, function: str, like: torch.Tensor, *arguments: object) -> None:
        """Run the exported `function`; tensors are passed as pointers, ints as int64, floats as double.

        Raises:
            BackendError: the kernel returned an error code.
        """
        entry = getattr(self.handle, function)
        with torch.cuda.device_of(like):
            status = entry(*map(converted, arguments), self._last_argument(like))
        if status != 0:
            raise BackendError(f"{function} failed with status {status}: {self._meaning(status)}")

    def scratch(self, query: str, like: torch.Tensor, *arguments: object) -> Sequence[torch.Tensor]:
        """Working memory of the size that `pmf_<query>_bytes` names; nothing on the CPU, whose kernels need none."""
        if self.device == "cpu":
            return ()
        entry = getattr(self.handle, f"pmf_{query}_bytes")
        entry.restype = ctypes.c_int64
        return (like.new_empty(max(1, entry(*map(converted, arguments))), dtype=torch.uint8),)

    def _last_argument(self, like: torch.Tensor) -> object:
        if self.device == "cpu":
            return ctypes.c_int64(torch.get_num_threads())
        return ctypes.c_void_p(torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else None)

    def _meaning(self, status: int) -> str:
        if status >= _CUDA_ERROR:
            return f"CUDA error {status - _CUDA_ERROR}; run with CUDA_LAUNCH_BLOCKING=1 to find the call that caused it"
        return _STATUS.get(status, "this is a bug, please report it")


def converted(argument: object) -> object:
    """`argument` as ctypes passes it."""
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument  # a ctypes structure or array


@contextlib.contextmanager
def use_face(face: Face) -> Iterator[None]:
    """Run the ops of this block on `face`, whatever the tensors' device (emulated kernels take CPU tensors)."""
    token = _forced.set(face)
    try:
        yield
    finally:
        _forced.reset(token)


def cpu_face() -> Face:
    """The CPU kernels.

    Raises:
        BackendError: there are none.
    """
    library = _library.cpu_library()
    if library is None:
        raise BackendError(f"native CPU kernels are not available: {_library.failure('cpu')}")
    return Face("cpu", library)


def face_of(tensor: torch.Tensor, cuda_dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64)) -> Face | None:
    """The face for ops on `tensor`; None: the reference (asked for, no library, or no kernel for this dtype)."""
    forced = _forced.get()
    if forced is None and not _library.native_available(tensor.device.type):
        return None
    if forced is None and tensor.device.type == "cpu":
        return cpu_face()
    if tensor.dtype not in cuda_dtypes:
        return None
    library = _library.cuda_library()
    return forced or (None if library is None else Face("cuda", library))
