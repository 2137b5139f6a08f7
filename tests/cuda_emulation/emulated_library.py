"""Compiles the CUDA sources for the host emulation (cuda_ext/emulation) and calls them with CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from posemap_fast.ops._build import find_compiler
from posemap_fast.ops._faces import converted

SOURCES_VARIABLE = "POSEMAP_EMULATION_SOURCES"  # names another cuda_ext, with bugs planted in it
ROOT = Path(os.environ.get(SOURCES_VARIABLE) or Path(__file__).resolve().parents[2] / "cuda_ext")
SANITIZE_VARIABLE = "POSEMAP_EMULATION_SANITIZE"  # set in the child process that has the sanitizers preloaded
FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-DPMF_EMULATE", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
FAILED = 900  # pmf::emulation::kFailed


class EmulationError(AssertionError):
    """The launch broke a rule of the execution model."""


class EmulatedLibrary:
    """The exported functions of an emulated CUDA library."""

    def __init__(self, path: Path):
        self.handle = ctypes.CDLL(str(path))
        self.handle.pmf_emulation_failure.restype = ctypes.c_char_p

    def schedule(self, kind: int, seed: int = 0) -> None:
        """Order of threads and blocks from now on: 0 forward, 1 reverse, 2 random."""
        self.handle.pmf_emulation_schedule(ctypes.c_int64(kind), ctypes.c_int64(seed))

    def status(self, function: str, *arguments: object) -> int:
        """Call `function(*arguments, stream)` and return its status."""
        entry = getattr(self.handle, function)
        entry.restype = ctypes.c_int64 if function.endswith("_bytes") else ctypes.c_int
        return int(entry(*(converted(a) for a in arguments), None))

    def call(self, function: str, *arguments: object) -> None:
        """Call and raise if the status is not 0."""
        status = self.status(function, *arguments)
        if status == FAILED:
            raise EmulationError(f"{function}: {self.handle.pmf_emulation_failure().decode()}")
        if status != 0:
            raise AssertionError(f"{function} returned {status}")

    def size(self, function: str, *arguments: object) -> int:
        """Value of a `..._bytes` query, which has no stream."""
        entry = getattr(self.handle, function)
        entry.restype = ctypes.c_int64
        return int(entry(*(converted(a) for a in arguments)))

    def scratch(self, function: str, *arguments: object) -> torch.Tensor:
        """Scratch memory as a `..._bytes` query asks for, filled with NaN patterns."""
        return torch.full((max(self.size(function, *arguments), 1),), 255, dtype=torch.uint8)


def sanitized() -> bool:
    """Whether this process runs under the sanitizers."""
    return os.environ.get(SANITIZE_VARIABLE) == "1"


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")


def compile_emulated(sources: list[Path], target: Path, root: Path = ROOT) -> None:
    """Compile CUDA sources of `root` with the emulation into the shared library `target` (atomic rename)."""
    compiler = find_compiler()
    assert compiler is not None
    flags = FLAGS + (SANITIZERS if sanitized() else [])
    includes = [f"-I{root / 'common'}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="emulation_", dir=target.parent) as folder:
        every = [*sources, ROOT / "emulation" / "emulation.cpp"]
        objects = [Path(folder) / f"{source.stem}.o" for source in every]
        commands = [
            [compiler, *flags, *includes, "-x", "c++", "-c", str(source), "-o", str(out)]
            for source, out in zip(every, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / target.name
        _run([compiler, *(SANITIZERS if sanitized() else []), "-shared", *map(str, objects), "-o", str(linked)])
        linked.replace(target)


def cuda_sources(root: Path = ROOT) -> list[Path]:
    """Every `*_cuda.cu` below `root`."""
    return sorted(root.glob("*/*_cuda.cu"))


def _key() -> str:
    digest = hashlib.sha256(" ".join([*FLAGS, *(SANITIZERS if sanitized() else [])]).encode())
    for file in sorted([*ROOT.glob("*/*.h"), *cuda_sources(), ROOT / "emulation" / "emulation.cpp"]):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def emulated_library() -> EmulatedLibrary:
    """All CUDA sources, built once per state of the sources into the user's cache."""
    cache = Path(os.environ.get("PMF_CACHE_DIR") or Path.home() / ".cache" / "posemap_fast")
    path = cache / "emulation" / _key() / "libpmf_emulated.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes start together
        if not path.exists():
            compile_emulated(cuda_sources(), path)
    return EmulatedLibrary(path)
