"""Where the files that travel with the package are: `configs` and `cuda_ext`, in a checkout or in a wheel."""

from __future__ import annotations

from pathlib import Path

__all__ = ["resource_dir"]

_PACKAGE = Path(__file__).resolve().parent


def resource_dir(name: str) -> Path:
    """Folder `name` beside the package (a checkout) or inside it (an installed wheel)."""
    beside = _PACKAGE.parent / name
    return beside if beside.is_dir() else _PACKAGE / name
