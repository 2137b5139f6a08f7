"""The machine under the figures: what it is, how busy, and its measured ceilings of memory traffic and arithmetic."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from posemap_fast.bench.timing import time_by_turns
from posemap_fast.environment import gather_environment
from posemap_fast.results import git_commit, shown_arguments

__all__ = ["YARDSTICK", "describe_machine", "machine_name", "measure_ceilings", "yardstick"]

_COPY_BYTES = 1 << 28  # far beyond any cache
_GEMM_SIDE = 2048
_SMOKE_SHRINK = 16
_YARDSTICK_FLOPS = 1e13
YARDSTICK = "10 TFLOP of products"
"""The peer of work that is done once, which no peer can be timed in turn with."""


def measure_ceilings(device: torch.device, is_smoke: bool = False) -> dict[str, float]:
    """Bytes per second of a large copy (read and written) and operations per second of a float32 matrix product."""
    shrink, seconds = (_SMOKE_SHRINK, 0.05) if is_smoke else (1, 1.0)
    source = torch.ones(_COPY_BYTES // shrink, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied, _ = time_by_turns(lambda: target.copy_(source), {}, device, seconds=seconds, min_repeats=5)
    return {
        "copy_bytes_per_s": 2 * source.numel() / (copied.median / 1e3),
        "gemm_flops_per_s": _product_flops_per_s(device, is_smoke, seconds),
    }


@contextlib.contextmanager
def yardstick(device: torch.device, is_smoke: bool = False) -> Iterator[dict[str, float]]:
    """What is done meanwhile gets a peer: `YARDSTICK` -> ms that it would take at the machine's speed before and after.

    The dictionary is filled at the end.
    """
    seconds = 0.05 if is_smoke else 0.5
    found: dict[str, float] = {}
    before = _product_flops_per_s(device, is_smoke, seconds)
    yield found
    after = _product_flops_per_s(device, is_smoke, seconds)
    found[YARDSTICK] = 1e3 * _YARDSTICK_FLOPS * (1 / before + 1 / after) / 2


def _product_flops_per_s(device: torch.device, is_smoke: bool, seconds: float) -> float:
    side = _GEMM_SIDE // (_SMOKE_SHRINK if is_smoke else 1)
    a, b = torch.randn(2, side, side, device=device)
    multiplied, _ = time_by_turns(lambda: a @ b, {}, device, seconds=seconds, min_repeats=5)
    return 2 * side**3 / (multiplied.median / 1e3)


def describe_machine(device: str, threads: int, is_smoke: bool) -> dict[str, Any]:
    """What a reader needs to judge the figures; JSON-ready, without folders of the machine: it gets published."""
    found = gather_environment().to_dict()
    for library in ("native_cpu", "native_cuda"):
        if found[library]["found"]:
            found[library]["found"] = Path(found[library]["found"]).name
    return {
        "commit": git_commit(),
        "command": " ".join(["python -m posemap_fast.bench", *shown_arguments()]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "threads": threads,
        "smoke": is_smoke,
        "load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "dtype": "float32",
        "seed": 0,
        "ceilings": measure_ceilings(torch.device(device), is_smoke),
        "environment": found,
    }


def machine_name(about: Mapping[str, Any]) -> str:
    """The machine of a report with this metadata, in words: ratios of two machines of one name may be compared."""
    environment = about["environment"]
    gpus = [gpu["name"] for gpu in environment.get("gpus", [])] if about["device"] == "cuda" else []
    has_amx = any(name.startswith("amx") for name in environment.get("vector_extensions", []))
    parts = [*gpus, environment.get("processor", ""), "AMX" if has_amx else "", f"{about['threads']} threads"]
    return ", ".join(filter(None, parts))
