"""Builds the native CPU library into the package, and ships `configs` and `cuda_ext` inside a wheel.

The compiler driver is `posemap_fast/ops/_build.py`, loaded by path: a build imports neither torch nor the package.
Without a compiler the build goes on with a warning; the library is then built, or missed, at the first use.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
RESOURCES = ("configs", "cuda_ext")


def load_builder() -> ModuleType:
    """`posemap_fast.ops._build` without importing its package."""
    spec = importlib.util.spec_from_file_location("pmf_build", ROOT / "posemap_fast" / "ops" / "_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_native(package: Path) -> None:
    """Write `_native/libpmf_cpu.so` and its key below `package`; a failure is a warning."""
    builder = load_builder()
    target = package / "_native" / builder.CPU_LIBRARY
    try:
        builder.build_cpu_library(ROOT / "cuda_ext", target)
    except builder.BuildError as error:
        print(
            f"warning: native CPU kernels were not built, the slow PyTorch reference will run: {error}", file=sys.stderr
        )
        return
    target.with_suffix(".key").write_text(builder.build_key(ROOT / "cuda_ext"))


def copy_resources(package: Path) -> None:
    """Copy the folders that `posemap_fast.resources` finds beside the package in a checkout."""
    for name in RESOURCES:
        shutil.rmtree(package / name, ignore_errors=True)  # left over from an earlier build
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))


class BuildPackage(build_py):
    """A wheel gets library and resources in its build folder; an editable install gets the library in the checkout."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            build_native(ROOT / "posemap_fast")
            return
        package = Path(self.build_lib) / "posemap_fast"
        build_native(package)
        copy_resources(package)


class PlatformDistribution(Distribution):
    """Marks the wheel as belonging to this platform: it holds a shared library."""

    def has_ext_modules(self) -> bool:
        return True


setup(
    packages=find_packages(include=["posemap_fast", "posemap_fast.*"]),
    cmdclass={"build_py": BuildPackage},
    distclass=PlatformDistribution,
)
