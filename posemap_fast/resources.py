"""Where files are: those that travel with the package (`configs`, `cuda_ext`), and the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir", "resource_dir"]

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Folder `name` beside the package (a checkout) or inside it (an installed wheel)."""
    beside = _PACKAGE.parent / name
    return beside if beside.is_dir() else _PACKAGE / name


def cache_dir() -> Path:
    """Where built libraries and decoded images are kept: `PMF_CACHE_DIR`, or the user's cache."""
    return Path(os.environ.get("PMF_CACHE_DIR") or Path.home() / ".cache" / "posemap_fast")
