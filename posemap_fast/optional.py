"""The optional libraries: how each is found, how it is installed, and why it cannot be used here.

They are imported at their first use only, so that the package works without them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from posemap_fast.errors import BackendError

__all__ = ["NERFACC", "PYCOLMAP", "TINYCUDANN", "OptionalLibrary"]

_TCNN_INSTALL = (
    'pip install "setuptools<81" ninja && TCNN_CUDA_ARCHITECTURES={architecture} pip install --no-build-isolation '
    '"git+https://github.com/NVlabs/tiny-cuda-nn/#subdirectory=bindings/torch"'
)


@dataclass(frozen=True)
class OptionalLibrary:
    """A Python package that the project can use but does not need."""

    module: str  # what is imported
    install_command: str  # `{architecture}` stands for the GPU's compute capability
    note: str  # what the command needs; `{nvcc}` stands for the compiler that fits torch
    kernels: str = ""  # submodule whose `_C` is the compiled code, where importing `module` does not load it
    needs_cuda: bool = True

    def version(self) -> str | None:
        """Installed version, None when it is not installed; nothing is imported."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return importlib.metadata.version(self.module)
        except importlib.metadata.PackageNotFoundError:
            return "of unknown version"

    def install_line(self) -> str:
        """The shell command that installs it for this torch and this GPU, and what it needs."""
        nvcc = (
            f"nvcc {torch.version.cuda}" if torch.version.cuda else "a CUDA build of torch, which this is not, its nvcc"
        )
        return f"{self.install_command.format(architecture=_architecture())}  ({self.note.format(nvcc=nvcc)})"

    def problem(self) -> str | None:
        """Why it cannot be used here; None when it can. Nothing is imported."""
        problems = []
        if self.needs_cuda and not torch.cuda.is_available():
            problems.append(f"{self.module} needs a CUDA device, and torch {torch.__version__} sees none")
        if self.version() is None:
            problems.append(f"{self.module} is not installed")
        return "; ".join(problems) or None

    def load(self) -> ModuleType:
        """Import it.

        Raises:
            BackendError: no CUDA device, not installed, or its import failed (for another torch, CUDA or GPU).
        """
        problem = self.problem()
        if problem is not None:
            mend = "" if self.version() else f"; install it with: {self.install_line()}"
            raise BackendError(problem + mend)
        try:
            module = importlib.import_module(self.module)
            if self.kernels and importlib.import_module(self.kernels)._C is None:
                raise ImportError("its kernels were not compiled: nvcc is not on PATH")
            return module
        except (ImportError, OSError, RuntimeError) as error:  # tinycudann raises EnvironmentError, an OSError
            raise BackendError(
                f"{self.module} {self.version()} is installed but does not load here ({error}); "
                f"build it again for this torch and GPU: {self.install_line()}"
            ) from error


def _architecture() -> str:
    """Compute capability of the first GPU as tiny-cuda-nn's build wants it; a usual one when there is no GPU."""
    if not torch.cuda.is_available():
        return "80"
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}"


TINYCUDANN = OptionalLibrary(
    "tinycudann",
    _TCNN_INSTALL,
    "needs {nvcc}, git and minutes; TCNN_CUDA_ARCHITECTURES is the GPU's compute capability, "
    "and setuptools<81 still has the pkg_resources that its setup.py imports",
)
NERFACC = OptionalLibrary(
    "nerfacc",
    "pip install nerfacc==0.5.3",
    "its kernels are compiled at the first use; needs {nvcc} on PATH, CUDA_HOME, ninja and minutes",
    kernels="nerfacc.cuda._backend",
)
PYCOLMAP = OptionalLibrary(
    "pycolmap",
    "pip install pycolmap",
    "ready-made for Linux, macOS and Windows, no GPU needed",
    needs_cuda=False,
)
