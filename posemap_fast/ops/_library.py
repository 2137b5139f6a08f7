"""Finds, and where needed builds, the native libraries once per process; says why when there is none.

Order for each, CPU and CUDA: (CUDA only) the file that PMF_CUDA_LIBRARY names; the library that setup.py built beside
the package; the user's cache (`$PMF_CACHE_DIR` or `~/.cache/posemap_fast`); a build into that cache (seconds, under a
file lock). `PMF_BACKEND=reference` never looks for them; with `PMF_BACKEND=native` the absence of the one needed
is an error. Importing this module does nothing; the first op call on a device does.
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
from posemap_fast.resources import cache_dir, resource_dir

__all__ = ["backend_name", "cpu_library", "cuda_library", "failure", "native_available", "use_backend"]

logger = logging.getLogger(__name__)
ABI_VERSION = 3
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
    """Run the ops in this block on `native` or `reference` code (`auto` is the default), their gradients too.

    On a GPU, autograd would compute these on a thread of its own, which knows nothing of the choice; in this block it
    stays on the calling thread.
    """
    if name not in _CHOICES:
        raise BackendError(f"unknown ops backend '{name}'; use one of {', '.join(_CHOICES)}")
    token = _forced.set(name)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        _forced.reset(token)


def native_available(device: str = "cpu") -> bool:
    """Whether ops on tensors of this device type ("cpu", "cuda") run native kernels here and now."""
    choice = _choice()
    if choice == "reference" or device not in _LIBRARIES:
        return False
    if _LIBRARIES[device]() is not None:
        return True
    if choice == "native":
        raise BackendError(f"native kernels were asked for but are not available: {failure(device)}")
    return False


def backend_name(device: str = "cpu") -> str:
    """`native` or `reference`: what ops on tensors of this device type run."""
    return "native" if native_available(device) else "reference"


_reasons: dict[str, str] = {}


def failure(device: str) -> str:
    """Why there is no library for this device type; empty when there is one or nobody has looked."""
    return _reasons.get(device, "")


def _give_up(device: str, error: Exception, mend: str) -> None:
    _reasons[device] = str(error)
    name = device.upper()
    logger.warning(
        "native %s kernels are not available (%s); running the slow PyTorch reference instead. %s",
        name,
        str(error).splitlines()[0],
        mend,
    )


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """The loaded CPU library, or None after one warning that says why and how to build it."""
    try:
        return _load(_locate())
    except (_build.BuildError, OSError, BackendError) as error:
        _give_up("cpu", error, "Install a C++ compiler and run: python -m posemap_fast.ops._build_cli")
        return None


@functools.cache
def cuda_library() -> ctypes.CDLL | None:
    """The loaded CUDA library, or None after one warning that says why and how to build it."""
    try:
        library = _load(_locate_cuda())
    except (_build.BuildError, OSError, BackendError) as error:
        _give_up("cuda", error, "To build them: python -m posemap_fast.ops._build_cli --cuda")
        return None
    _tell_of_ptx()
    return library


_LIBRARIES = {"cpu": cpu_library, "cuda": cuda_library}


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    version = library.pmf_abi_version()
    if version != ABI_VERSION:
        raise BackendError(f"{path}: ABI version {version}, expected {ABI_VERSION}; delete it to have it rebuilt")
    return library


def _locate() -> Path:
    """Path of a CPU library for these sources and this machine, building it when there is none."""
    root = resource_dir("cuda_ext")
    return _find_or_build(
        "CPU", _build.CPU_LIBRARY, _build.build_key(root), lambda to: _build.build_cpu_library(root, to)
    )


def _present_capabilities() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs here, each once."""
    if not torch.cuda.is_available():
        return []
    return sorted({torch.cuda.get_device_capability(k) for k in range(torch.cuda.device_count())})


def _locate_cuda() -> Path:
    """Path of a CUDA library for these sources and the present GPUs, building it when there is none."""
    given = os.environ.get("PMF_CUDA_LIBRARY")
    if given:
        if not Path(given).is_file():
            raise BackendError(f"PMF_CUDA_LIBRARY={given}: there is no such file")
        return Path(given)
    root = resource_dir("cuda_ext")
    every = list(_build.ALL_ARCHITECTURES)
    built = _built_with_package(_build.CUDA_LIBRARY, _build.cuda_build_key(root, every))
    if built is not None:
        return built
    wanted = _build.architectures(_present_capabilities())
    key = _build.cuda_build_key(root, wanted)
    return _find_or_build("CUDA", _build.CUDA_LIBRARY, key, lambda to: _build.build_cuda_library(root, to, wanted))


def _tell_of_ptx() -> None:
    """One line when a GPU is newer than every architecture that a full build knows."""
    newest = max(map(int, _build.ALL_ARCHITECTURES))
    for major, minor in _present_capabilities():
        if 10 * major + minor > newest:
            logger.info(
                "GPU of compute capability %d.%d is newer than the library: its PTX is compiled at first load",
                major,
                minor,
            )


def _built_with_package(name: str, key: str) -> Path | None:
    """The library that setup.py put beside the package, if its key is `key`."""
    built = _PACKAGE / "_native" / name
    key_file = built.with_suffix(".key")
    matches = built.is_file() and key_file.is_file() and key_file.read_text().strip() == key
    return built if matches else None


def _find_or_build(label: str, name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The library beside the package or in the cache, else a new one in the cache."""
    target = _built_with_package(name, key) or cache_dir() / key / name
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same key
        if not target.is_file():
            start = time.perf_counter()
            build(target)
            logger.warning("built native %s kernels in %.1f s: %s", label, time.perf_counter() - start, target)
    return target
