"""`python -m posemap_fast.ops._build_cli`: build the native CPU kernels now and say where they are."""

from __future__ import annotations

import sys

from posemap_fast.ops import _build
from posemap_fast.ops._library import _locate


def main() -> int:
    """Build (or find) the library; exit code 2 with the compiler's message when that fails."""
    try:
        print(f"native CPU kernels: {_locate()}")
    except _build.BuildError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
