"""Finds, and where needed builds, the native CPU library once per process; says why when there is none.

Order: the library that setup.py built beside the package, then the user's cache
(`$PMF_CACHE_DIR` or `~/.cache/posemap_fast`), then a build into that cache (seconds, under a file lock).
`PMF_BACKEND=reference` never looks for it; `PMF_BACKEND=native` makes its absence an error.
Importing this module does nothing; the first op call does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from posemap_fast.errors import BackendError
from posemap_fast.ops import _build
from posemap_fast.resources import resource_dir

__all__ = ["backend_name", "call", "cpu_library", "native_available", "use_backend"]

logger = logging.getLogger(__name__)
ABI_VERSION = 1
_STATUS = {2: "out of memory", 3: "an index must be sorted and name existing rows"}
_PACKAGE = Path(__file__).resolve().parents[1]
_CHOICES = ("auto", "native", "reference")
_forced: ContextVar[str | None] = ContextVar("posemap_fast_backend", default=None)


def _choice() -> str:
    choice = _forced.get() or os.environ.get("PMF_BACKEND", "auto")
    if choice not in _CHOICES:
        raise BackendError(f"PMF_BACKEND={choice}: unknown backend; use one of {', '.join(_CHOICES)}")
    return choice


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops in this block on `native` or `reference` code (`auto` is the default)."""
    if name not in _CHOICES:
        raise BackendError(f"unknown ops backend '{name}'; use one of {', '.join(_CHOICES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def native_available() -> bool:
    """Whether ops on CPU tensors run the native kernels here and now."""
    choice = _choice()
    if choice == "reference":
        return False
    if cpu_library() is not None:
        return True
    if choice == "native":
        raise BackendError(f"native kernels were asked for but are not available: {_failure()}")
    return False


def backend_name() -> str:
    """`native` or `reference`: what ops on CPU tensors run."""
    return "native" if native_available() else "reference"


_reason: list[str] = []


def _failure() -> str:
    return _reason[-1] if _reason else "unknown reason"


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The loaded CPU library, or None after one warning that says why and how to build it."""
    try:
        return _load(_locate())
    except (_build.BuildError, OSError, BackendError) as error:
        _reason.append(str(error))
        logger.warning(
            "native CPU kernels are not available (%s); running the slow PyTorch reference instead. "
            "Install a C++ compiler and run: python -m posemap_fast.ops._build_cli",
            str(error).splitlines()[0],
        )
        return None


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.pmf_abi_version()
    if version != ABI_VERSION:
        raise BackendError(f"{path}: ABI version {version}, expected {ABI_VERSION}; delete it to have it rebuilt")
    return library


def _cache_dir() -> Path:
    return Path(os.environ.get("PMF_CACHE_DIR") or Path.home() / ".cache" / "posemap_fast")


def _locate() -> Path:
    """Path of a library for these sources and this machine, building it when there is none."""
    root = resource_dir("cuda_ext")
    built = _PACKAGE / "_native" / _build.CPU_LIBRARY
    key_file = built.with_suffix(".key")
    key = _build.build_key(root)
    if built.is_file() and key_file.is_file() and key_file.read_text().strip() == key:
        return built
    target = _cache_dir() / key / _build.CPU_LIBRARY
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same key
        if not target.is_file():
            start = time.perf_counter()
            _build.build_cpu_library(root, target)
            logger.warning("built native CPU kernels in %.1f s: %s", time.perf_counter() - start, target)
    return target


def call(function: str, *arguments: object) -> None:
    """Call `function` of the CPU library; tensors are passed as pointers, ints as int64, floats as double.

    The last argument of every kernel is the number of threads, which is added here: torch's own setting.

    Raises:
        BackendError: the kernel returned an error code.
    """
    library = cpu_library()
    assert library is not None, "call native_available() first"
    entry: Callable[..., int] = getattr(library, function)
    converted = [_convert(argument) for argument in arguments]
    status = entry(*converted, ctypes.c_int64(torch.get_num_threads()))
    if status != 0:
        meaning = _STATUS.get(status, "this is a bug, please report it")
        raise BackendError(f"{function} failed with status {status}: {meaning}")


def _convert(argument: object) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, torch.Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument  # a ctypes structure or array
