"""Builds tiny-cuda-nn or nerfacc from local files for this torch and this GPU, on a machine without network.

    python benchmarks/gpu_libraries.py FOLDER SITE tcnn|nerfacc

FOLDER holds `tiny-cuda-nn` (its sources, submodules included), `nerfacc-*.whl`, and wheels that the builds need and
this Python lacks (setuptools<81, ninja). SITE is where the libraries go; put it on PYTHONPATH to use them. Sources are
changed as the install lines of `posemap inspect --environment` change them, in a copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from posemap_fast.errors import BackendError
from posemap_fast.optional import NERFACC, TINYCUDANN

_BUILD_TOOLS = ("setuptools", "ninja", "wheel", "packaging")


def pip_install(site: Path, what: list[Path], environment: dict[str, str] | None = None) -> None:
    """Install without network and without what the packages ask for."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--upgrade"]
    command += ["--verbose", "--target", str(site), *map(str, what)]
    subprocess.run(command, check=True, env=os.environ | (environment or {}))


def install_build_tools(folder: Path, tools: Path) -> dict[str, str]:
    """Put the wheels that serve the build into `tools`; the environment in which Python finds them first."""
    wheels = [path for path in sorted(folder.glob("*.whl")) if path.name.startswith(_BUILD_TOOLS)]
    if not wheels:
        return {}
    pip_install(tools, wheels)
    path = os.pathsep.join(filter(None, [str(tools), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "PATH": os.pathsep.join([str(tools / "bin"), os.environ["PATH"]])}


def build_tcnn(folder: Path, site: Path) -> None:
    """Compile FOLDER/tiny-cuda-nn for the first GPU."""
    sources = folder / "tiny-cuda-nn"
    if not (sources / "dependencies" / "cutlass" / "include").is_dir():
        raise BackendError(f"{sources} is not tiny-cuda-nn with its submodules (no dependencies/cutlass/include)")
    environment = install_build_tools(folder, site.parent / "build_tools")
    copy = site.parent / "tiny-cuda-nn"
    shutil.copytree(sources, copy, symlinks=True, dirs_exist_ok=True)
    bindings = copy / "bindings" / "torch"
    for mend in TINYCUDANN.needed_mends():
        mend.apply(bindings)
    if "TCNN_CUDA_ARCHITECTURES" not in os.environ:
        major, minor = torch.cuda.get_device_capability(0)
        environment["TCNN_CUDA_ARCHITECTURES"] = f"{major}{minor}"
    pip_install(site, [bindings], environment)


def build_nerfacc(folder: Path, site: Path) -> None:
    """Install FOLDER/nerfacc-*.whl and have its kernels compiled, which it would otherwise do at the first use."""
    wheels = sorted(folder.glob("nerfacc-*.whl"))
    if len(wheels) != 1:
        raise BackendError(
            f"{folder} must hold one nerfacc-*.whl (pip download --no-deps nerfacc==0.5.3); found {wheels}"
        )
    pip_install(site, wheels)
    for mend in NERFACC.needed_mends():
        mend.apply(site / "nerfacc")
    environment = os.environ | install_build_tools(folder, site.parent / "build_tools")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(site), environment.get("PYTHONPATH")]))
    check = "import nerfacc.cuda._backend as b; assert b._C is not None, 'not compiled'; print(b._C)"
    subprocess.run([sys.executable, "-c", check], check=True, env=environment)


_BUILDS = {"tcnn": build_tcnn, "nerfacc": build_nerfacc}


def main() -> int:
    """Build one library; exit code 1 when that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("site", metavar="SITE", type=Path)
    parser.add_argument("name", choices=sorted(_BUILDS))
    arguments = parser.parse_args()
    try:
        _BUILDS[arguments.name](arguments.folder.resolve(), arguments.site.resolve())
    except (BackendError, OSError, subprocess.CalledProcessError) as error:
        print(f"gpu_libraries: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
