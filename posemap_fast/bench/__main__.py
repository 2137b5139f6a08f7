"""`python -m posemap_fast.bench`."""

from __future__ import annotations

from posemap_fast.bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
