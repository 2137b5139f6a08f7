"""What a figure depends on and what a bug report needs: versions, devices, compilers, native and optional libraries.

Gathers and never prints; every value is plain data for JSON. What is missing comes with the reason and the mend.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import posemap_fast
from posemap_fast.ops import _library
from posemap_fast.ops._build import find_compiler, find_nvcc
from posemap_fast.optional import NERFACC, PYCOLMAP, TINYCUDANN, OptionalLibrary

__all__ = ["GPU", "Component", "Environment", "gather_environment", "processor_name"]

_VECTOR = re.compile(r"avx2|avx512f|avx512_(bf16|fp16|vnni)|amx_\w+|asimd|sve2?|(sve)?bf16")  # flags that decide speed
_PROBE_SECONDS = 20  # a compiler or driver tool that does not answer by then counts as silent


@dataclass(frozen=True)
class Component:
    """A part that may be there or not: `found` says what is, `problem` why it is not, `mend` what to do."""

    found: str | None = None
    problem: str | None = None
    mend: str | None = None


@dataclass(frozen=True)
class GPU:
    """A CUDA device that torch sees."""

    name: str
    capability: str  # compute capability, as 9.0
    memory_gib: float


@dataclass(frozen=True)
class Environment:
    """The machine and the software, as far as they decide what runs and how fast."""

    posemap_fast: str
    python: str
    platform: str
    processor: str
    vector_extensions: tuple[str, ...]  # of the processor that speed depends on, by Linux' names; unknown elsewhere
    cores: int  # that this process may use
    torch: str
    threads: int  # that torch uses
    cuda_runtime: str | None  # that torch was built for
    cuda_driver: Component
    gpus: tuple[GPU, ...]
    compiler: Component
    nvcc: Component
    native_cpu: Component
    native_cuda: Component
    tinycudann: Component
    nerfacc: Component
    pycolmap: Component

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)


def gather_environment() -> Environment:
    """Look at everything; builds the native CPU library when it can be built and is not there yet."""
    return Environment(
        posemap_fast=posemap_fast.__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        processor=processor_name(),
        vector_extensions=tuple(sorted(filter(_VECTOR.fullmatch, _cpu_info("flags", "Features").split()))),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        cuda_runtime=torch.version.cuda,
        cuda_driver=_cuda_driver(),
        gpus=_gpus(),
        compiler=_compiler(),
        nvcc=_nvcc(),
        native_cpu=_native_cpu(),
        native_cuda=_native_cuda(),
        tinycudann=_optional(TINYCUDANN),
        nerfacc=_optional(NERFACC),
        pycolmap=_optional(PYCOLMAP),
    )


def processor_name() -> str:
    """Model of the processor."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(*keys: str) -> str:
    """What Linux says of the first core under the first of the keys that it has; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(keys)), "")


def _output_of(*command: str) -> str | None:
    """Standard output of a command; None when it fails, is missing or does not answer."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PROBE_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _gpus() -> tuple[GPU, ...]:
    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(GPU(p.name, f"{p.major}.{p.minor}", round(p.total_memory / 2**30, 1)) for p in properties)


def _cuda_driver() -> Component:
    version = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not version:
        return Component(problem="nvidia-smi finds no driver", mend="install NVIDIA's driver, if there is a GPU")
    if torch.version.cuda is None:
        mend = "install a CUDA build of torch"
        return Component(version.splitlines()[0], f"torch {torch.__version__} is a CPU build and cannot use it", mend)
    return Component(version.splitlines()[0])


def _compiler() -> Component:
    path = find_compiler()
    if path is None:
        return Component(problem="no C++ compiler found", mend="install g++ (apt-get install g++), or set CXX")
    return Component(f"{path} ({(_output_of(path, '--version') or 'version unknown').splitlines()[0]})")


def _nvcc() -> Component:
    path = find_nvcc()
    if path is None:
        return Component(problem="nvcc was not found", mend="install the CUDA toolkit, or set CUDA_HOME")
    version = re.search(r"V([\d.]+)", _output_of(path, "--version") or "")
    return Component(f"{path} ({version.group(1) if version else 'version unknown'})")


def _native_cpu() -> Component:
    mend = "install a C++ compiler and run: python -m posemap_fast.ops._build_cli"
    return _native("cpu", _library.cpu_library(), mend)


def _native_cuda() -> Component:
    if not torch.cuda.is_available():  # looking for it would build it, for minutes and for nobody
        return Component(problem=f"torch {torch.__version__} sees no CUDA device")
    mend = "install nvcc of torch's CUDA version and run: python -m posemap_fast.ops._build_cli --cuda"
    return _native("cuda", _library.cuda_library(), mend)


def _native(device: str, library: ctypes.CDLL | None, mend: str) -> Component:
    """A native library by the path that it was loaded from, or the first line of why there is none."""
    if library is not None:
        return Component(library._name)
    return Component(problem=(_library.failure(device) or "unknown reason").splitlines()[0], mend=mend)


def _optional(library: OptionalLibrary) -> Component:
    return Component(library.version(), library.problem(), None if library.version() else library.install_line())
