"""`python -m posemap_fast.ops._build_cli [--cuda]`: build the native kernels now and say where they are."""

from __future__ import annotations

import argparse
import sys

from posemap_fast.errors import BackendError
from posemap_fast.ops import _build, _library


def main(arguments: list[str] | None = None) -> int:
    """Build (or find) the library; exit code 2 with the compiler's message when that fails."""
    parser = argparse.ArgumentParser(prog="python -m posemap_fast.ops._build_cli", description=__doc__)
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="the CUDA kernels, for the GPUs here (or TORCH_CUDA_ARCH_LIST, or all supported ones)",
    )
    is_cuda = parser.parse_args(arguments).cuda
    try:
        path = _library._locate_cuda() if is_cuda else _library._locate()
        print(f"native {'CUDA' if is_cuda else 'CPU'} kernels: {path}")
    except (_build.BuildError, BackendError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
