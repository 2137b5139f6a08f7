"""Errors that a user of posemap_fast may meet; every one is one line that names the cause and the mend.

All derive from `PosemapError`, which the command line turns into exit code 2.
"""

from __future__ import annotations

__all__ = ["BackendError", "ConfigError", "DatasetError", "FileFormatError", "PosemapError", "ShapeError"]


class PosemapError(Exception):
    """Base of all errors raised on purpose by this package."""


class ConfigError(PosemapError):
    """A configuration file, preset or `--set` has an unknown key, a wrong type or an impossible value."""


class ShapeError(PosemapError):
    """A tensor at a public boundary has the wrong shape, dtype or device."""


class DatasetError(PosemapError):
    """Input images, poses or splits are missing, damaged or inconsistent."""


class BackendError(PosemapError):
    """A requested native library, device or optional package is not available."""


class FileFormatError(PosemapError):
    """A file written by this package is truncated, damaged or of another kind or version."""
