"""Builds the native libraries, CPU and CUDA; shared by setup.py and the first use (standard library only).

They are plain C++ and CUDA behind a C ABI, so a build needs a compiler (c++ or nvcc) and nothing else: no torch
headers, no CMake. One CUDA library serves every torch and Python; its runtime is linked statically, so it loads without
a driver.
`build_key` names a build by its sources, flags and processor; a library found under another key is not loaded,
because `-march=native` code may not run on another machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = [
    "CPU_LIBRARY",
    "CUDA_LIBRARY",
    "BuildError",
    "architectures",
    "build_cpu_library",
    "build_cuda_library",
    "build_key",
    "cpu_sources",
    "cuda_build_key",
    "cuda_sources",
    "find_compiler",
    "find_nvcc",
    "nvcc_version",
]

CPU_LIBRARY, CUDA_LIBRARY = "libpmf_cpu.so", "libpmf_cuda.so"
# No -ffast-math: gcc then links a start-up file that flushes denormals to zero for the whole process.
CPU_FLAGS = (
    "-O3 -std=c++17 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-fvisibility=hidden -mprefer-vector-width=512 -Wall -Wextra -Wno-unknown-pragmas"
).split()
CUDA_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -cudart static".split()
ALL_ARCHITECTURES = ("80", "86", "89", "90", "120")
_OLDEST_NVCC = {"89": (11, 8), "90": (11, 8), "100": (12, 8), "120": (12, 8)}  # first release that knows it


class BuildError(RuntimeError):
    """No compiler, or the compiler refused the sources."""


def cpu_sources(root: Path) -> list[Path]:
    """All `*_cpu.cpp` files below `cuda_ext`."""
    return sorted(root.glob("*/*_cpu.cpp"))


def find_compiler() -> str | None:
    """`CXX` if set, else the first of c++, g++, clang++ on PATH."""
    wanted = os.environ.get("CXX")
    candidates = [wanted] if wanted else ["c++", "g++", "clang++"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def _architecture() -> str:
    """`-march` value: this machine's own, unless PMF_MARCH names a portable one (`x86-64-v3`)."""
    return os.environ.get("PMF_MARCH", "native")


def _processor() -> str:
    """What `-march=native` depends on: machine and processor features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    wanted = ("flags", "Features", "cpu family", "model")
    found = sorted({line for line in lines if line.split("\t")[0].strip() in wanted})
    return platform.machine() + "\n".join(found)


def build_key(root: Path) -> str:
    """Digest of sources, headers, flags and processor."""
    digest = hashlib.sha256()
    files = [*cpu_sources(root), *sorted(root.glob("*/*.h"))]
    for file in files:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    digest.update(" ".join([*CPU_FLAGS, _architecture()]).encode() + _processor().encode())
    return digest.hexdigest()[:24]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()}")


def _compile_and_link(commands: list[list[str]], link: list[str], target: Path, folder: Path) -> None:
    """Run the compilations side by side, link, and move the result to `target` in one step."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, commands))
    linked = folder / target.name
    _run([*link, "-o", str(linked)])
    linked.replace(target)


def build_cpu_library(root: Path, target: Path) -> None:
    """Compile every `*_cpu.cpp` below `root` and link them into `target` (atomic rename).

    Raises:
        BuildError: no compiler was found, or it reported an error (its message is quoted).
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found; install g++ (Debian/Ubuntu: apt-get install g++) or set CXX")
    sources = cpu_sources(root)
    if not sources:
        raise BuildError(f"no C++ sources below {root}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pmf_build_", dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        base = [compiler, *CPU_FLAGS, f"-march={_architecture()}", f"-I{root / 'common'}"]
        commands = [[*base, "-c", str(source), "-o", str(out)] for source, out in zip(sources, objects, strict=True)]
        link = [compiler, "-shared", "-fopenmp", *map(str, objects)]
        _compile_and_link(commands, link, target, Path(folder))


def cuda_sources(root: Path) -> list[Path]:
    """All `*_cuda.cu` files below `cuda_ext`."""
    return sorted(root.glob("*/*_cuda.cu"))


def find_nvcc() -> str | None:
    """`PMF_NVCC` if set, else nvcc of CUDA_HOME, on PATH, or in /usr/local/cuda."""
    wanted = os.environ.get("PMF_NVCC")
    if wanted:
        return shutil.which(wanted)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in candidates if (path := shutil.which(name))), None)


def nvcc_version(nvcc: str) -> tuple[int, int]:
    """(major, minor) of the CUDA toolkit.

    Raises:
        BuildError: nvcc does not say.
    """
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise BuildError(f"{nvcc} cannot be run: {error}") from error
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise BuildError(f"{nvcc} --version names no release; is it NVIDIA's compiler?")
    return int(found[1]), int(found[2])


def architectures(present: list[tuple[int, int]] | None = None) -> list[str]:
    """Compute capabilities to build for, as in `sm_90`: TORCH_CUDA_ARCH_LIST, else the present GPUs', else all five.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST cannot be read.
    """
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not listed:
        return sorted({f"{major}{minor}" for major, minor in present or []}, key=int) or list(ALL_ARCHITECTURES)
    names = [name.removesuffix("+PTX").replace(".", "") for name in listed]
    for name, written in zip(names, listed, strict=True):
        if not name.rstrip("af").isdigit():
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: '{written}' is not a compute capability; write e.g. '8.6;9.0'")
    return names


def _check_nvcc(nvcc: str, wanted: list[str]) -> None:
    version = nvcc_version(nvcc)
    for name in wanted:
        oldest = _OLDEST_NVCC.get(name.rstrip("af"), (11, 0))
        if version < oldest:
            raise BuildError(
                f"nvcc {version[0]}.{version[1]} ({nvcc}) is too old for compute capability {name[:-1]}.{name[-1]}; "
                f"install CUDA {oldest[0]}.{oldest[1]} or newer, or set TORCH_CUDA_ARCH_LIST to what it can build"
            )


def cuda_build_key(root: Path, wanted: list[str]) -> str:
    """Digest of CUDA sources, headers, flags and architectures; not of the toolkit: any that built it will do."""
    digest = hashlib.sha256()
    for file in [*cuda_sources(root), *sorted(root.glob("*/*.h"))]:
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    digest.update(" ".join([*CUDA_FLAGS, *wanted]).encode())
    return digest.hexdigest()[:24]


def _gencode(wanted: list[str]) -> list[str]:
    """Machine code for each architecture and PTX of the newest, which newer GPUs compile when they load it."""
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in wanted]
    newest = max(wanted, key=lambda name: int(name.rstrip("af")))
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def build_cuda_library(root: Path, target: Path, wanted: list[str], *extra_flags: str) -> None:
    """Compile every `*_cuda.cu` below `root` for the architectures `wanted` and link them into `target`.

    Raises:
        BuildError: no nvcc, one too old for an architecture, no host compiler, or an error that nvcc reports.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(
            "no nvcc found; install the CUDA toolkit (12.0 or newer) and put nvcc on PATH or set CUDA_HOME, "
            "or set PMF_CUDA_LIBRARY to a libpmf_cuda.so that was built elsewhere"
        )
    if find_compiler() is None:
        raise BuildError(
            "nvcc needs a C++ compiler and none was found; install g++ (Debian/Ubuntu: apt-get install g++)"
        )
    _check_nvcc(nvcc, wanted)
    sources = cuda_sources(root)
    if not sources:
        raise BuildError(f"no CUDA sources below {root}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pmf_build_", dir=target.parent) as folder:
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        base = [nvcc, *CUDA_FLAGS, *_gencode(wanted), *extra_flags, f"-I{root / 'common'}"]
        commands = [[*base, "-c", str(source), "-o", str(out)] for source, out in zip(sources, objects, strict=True)]
        link = [nvcc, "-shared", "-cudart", "static", *map(str, objects)]
        _compile_and_link(commands, link, target, Path(folder))
