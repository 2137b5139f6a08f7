"""Which backend `auto` stands for, and which of the known ones can run here.

Order of preference: this package's own kernels, then the optional library for the same work, then the reference.
Only names leave this module: what is stored with a run or in a map is never `auto`.
"""

from __future__ import annotations

import logging
from typing import Literal

import torch

from posemap_fast.errors import ConfigError
from posemap_fast.ops import _library
from posemap_fast.optional import NERFACC, TINYCUDANN, OptionalLibrary

__all__ = ["AUTO", "named_device", "resolve_backend", "runnable_backend", "why_not"]

logger = logging.getLogger(__name__)

AUTO = "auto"
Kind = Literal["field.backbone", "render.backend"]

_ORDER: dict[Kind, tuple[str, ...]] = {
    "field.backbone": ("native", "tcnn", "reference"),
    "render.backend": ("native", "nerfacc", "reference"),
}
_LIBRARIES: dict[str, OptionalLibrary] = {"tcnn": TINYCUDANN, "nerfacc": NERFACC}


def named_device(name: str) -> torch.device:
    """The device that a user names: cpu, cuda, cuda:1, ..., or `auto`, the first GPU where there is one.

    Raises:
        ConfigError: no such name, or no such GPU here.
    """
    if name == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: '{name}' is no device; use auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: '{name}' is not supported; use auto, cpu, cuda or cuda:0")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: '{name}' was asked for, torch {torch.__version__} sees no such GPU; use cpu")
    return device


def why_not(name: str, device: torch.device) -> str | None:
    """Why the backend `name` cannot run on `device`; None when it can (`native` and `reference` always can)."""
    library = _LIBRARIES.get(name)
    if library is None:
        return None
    if device.type != "cuda":
        return f"{library.module} computes on CUDA devices only"
    return library.problem()


def _why_not_best(name: str, device: torch.device) -> str | None:
    """Why `auto` passes `name` over; on the CPU `native` is best even where it falls back to the reference."""
    if name == "native" and device.type != "cpu" and not _library.native_available(device.type):
        return f"no native kernels for {device.type} here"
    return why_not(name, device)


def resolve_backend(kind: Kind, name: str, device: torch.device) -> str:
    """The backend that `auto` stands for on `device`, said in the log; any other name as it is.

    Args:
        kind: the key of the configuration, which decides the candidates.
        name: a registered name, or `auto`.
    """
    if name != AUTO:
        return name
    passed_over = []
    for candidate in _ORDER[kind]:
        reason = _why_not_best(candidate, device)
        if reason is None:
            break
        passed_over.append(f"{candidate}: {reason}")
    if candidate == "native" and not _library.native_available(device.type):
        passed_over.append("its ops run on their reference, because the native library is missing")
    logger.info("%s: auto is %s on %s%s", kind, candidate, device, _because(passed_over))
    return candidate


def runnable_backend(kind: Kind, name: str, device: torch.device) -> str:
    """The backend to read a map with that was trained on `name`: that one where it can run, else what `auto` gives."""
    reason = why_not(name, device)
    if reason is None:
        return resolve_backend(kind, name, device)
    logger.info("%s: the map was trained with %s, which cannot run here (%s)", kind, name, reason)
    return resolve_backend(kind, AUTO, device)


def _because(passed_over: list[str]) -> str:
    return f" ({'; '.join(passed_over)})" if passed_over else ""
