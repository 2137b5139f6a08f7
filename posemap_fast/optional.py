"""The optional libraries: how each is found, how it is installed, and why it cannot be used here.

They are imported at their first use only, so that the package works without them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from posemap_fast.errors import BackendError

__all__ = ["NERFACC", "PYCOLMAP", "TINYCUDANN", "OptionalLibrary", "SourceMend"]

_TCNN_INSTALL = (
    'pip install "setuptools<81" ninja && git clone --recursive https://github.com/NVlabs/tiny-cuda-nn && {mends}'
    "TCNN_CUDA_ARCHITECTURES={architecture} pip install --no-build-isolation ./tiny-cuda-nn/bindings/torch"
)


@dataclass(frozen=True)
class SourceMend:
    """A substitution in a library's sources without which they do not compile for torch from `since` on."""

    since: tuple[int, int]  # torch's major and minor version
    folder: str  # shell word for the sources, as the install command leaves them
    file: str  # below it
    old: str  # a fixed string
    new: str

    def is_needed(self) -> bool:
        """Whether this torch needs it."""
        return _torch_version() >= self.since

    def command(self) -> str:
        """The substitution as a shell command."""
        old, new = (text.replace("/", r"\/").replace("[", r"\[") for text in (self.old, self.new))
        return f"sed -i 's/{old}/{new}/' {self.folder}/{self.file}"

    def apply(self, folder: Path) -> None:
        """The substitution in the sources below `folder`; nothing where it was made before.

        Raises:
            BackendError: the file is not there, or has neither text: these are not the sources that it was made for.
        """
        path = folder / self.file
        text = path.read_text() if path.is_file() else ""
        if self.old not in text and self.new not in text:
            raise BackendError(f"{path} has no {self.old!r}, which {self.new!r} must replace: another version of it?")
        path.write_text(text.replace(self.old, self.new))


@dataclass(frozen=True)
class OptionalLibrary:
    """A Python package that the project can use but does not need."""

    module: str  # what is imported
    install_command: str  # `{architecture}`: the GPU's compute capability; `{mends}`: those that this torch needs
    note: str  # what the command needs; `{nvcc}` stands for the compiler that fits torch
    kernels: str = ""  # submodule whose `_C` is the compiled code, where importing `module` does not load it
    needs_cuda: bool = True
    mends: tuple[SourceMend, ...] = ()

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
        mends = "".join(f"{mend.command()} && " for mend in self.needed_mends())
        command = self.install_command.format(architecture=_architecture(), mends=mends).removesuffix(" && ")
        return f"{command}  ({self.note.format(nvcc=nvcc)})"

    def needed_mends(self) -> list[SourceMend]:
        """The substitutions in its sources that this torch needs."""
        return [mend for mend in self.mends if mend.is_needed()]

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


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


# torch's headers ask for C++20 from 2.14 on. Only tiny-cuda-nn's bindings include them; its own sources must stay
# with C++17, because the formatting library that it brings does not compile as C++20 with nvcc.
_TCNN_CPP20 = SourceMend(
    (2, 14),
    "tiny-cuda-nn/bindings/torch",
    "setup.py",
    'base_cflags = [f"-std=c++{cpp_standard}"]',
    'base_cflags = ["-std=c++20"]',
)
# torch compiles extensions as C++20 from 2.12 on (tried with 2.14), where <cmath> has a `lerp` of its own.
_NERFACC_FOLDER = "\"$(python -c 'import nerfacc; print(nerfacc.__path__[0])')\""
_NERFACC_LERP = SourceMend((2, 12), _NERFACC_FOLDER, "cuda/csrc/include/utils_math.cuh", " lerp(", " lerp_of(")

TINYCUDANN = OptionalLibrary(
    "tinycudann",
    _TCNN_INSTALL,
    "needs {nvcc}, git and minutes; TCNN_CUDA_ARCHITECTURES is the GPU's compute capability, "
    "and setuptools<81 still has the pkg_resources that its setup.py imports",
    mends=(_TCNN_CPP20,),
)
NERFACC = OptionalLibrary(
    "nerfacc",
    "pip install nerfacc==0.5.3 && {mends}",
    "its kernels are compiled at the first use; needs {nvcc} on PATH, CUDA_HOME, ninja and minutes",
    kernels="nerfacc.cuda._backend",
    mends=(_NERFACC_LERP,),
)
PYCOLMAP = OptionalLibrary(
    "pycolmap",
    "pip install pycolmap",
    "ready-made for Linux, macOS and Windows, no GPU needed",
    needs_cuda=False,
)
