"""Builds the native CPU library with the C++ compiler; shared by setup.py and the first use (standard library only).

The library is plain C++ behind a C ABI, so the build needs a compiler and nothing else: no torch headers, no CMake.
`build_key` names a build by its sources, flags and processor; a library found under another key is not loaded,
because `-march=native` code may not run on another machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["CPU_LIBRARY", "BuildError", "build_cpu_library", "build_key", "cpu_sources", "find_compiler"]

CPU_LIBRARY = "libpmf_cpu.so"
# No -ffast-math: gcc then links a start-up file that flushes denormals to zero for the whole process.
CPU_FLAGS = (
    "-O3 -std=c++17 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast "
    "-fvisibility=hidden -mprefer-vector-width=512 -Wall -Wextra -Wno-unknown-pragmas"
).split()


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
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(_run, commands))
        linked = Path(folder) / target.name
        _run([compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(linked)])
        linked.replace(target)
