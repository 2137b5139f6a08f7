"""Fixtures of the emulated CUDA kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from posemap_fast.ops._build import find_compiler

from .emulated_library import EmulatedLibrary, emulated_library, sanitized


@pytest.fixture
def emulated() -> EmulatedLibrary:
    """The CUDA kernels, run on the host."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler: the emulation of the CUDA kernels cannot be built")
    return emulated_library()


# Under the sanitizers, which make everything ten times slower, one random order: they look at addresses, not at order.
SCHEDULES = ["random-1"] if sanitized() else ["forward", "reverse", "random-1", "random-2"]


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest, emulated: EmulatedLibrary) -> Iterator[str]:
    """Order in which threads and blocks run; a result that depends on it lacks a barrier."""
    kind, _, seed = request.param.partition("-")
    emulated.schedule(["forward", "reverse", "random"].index(kind), int(seed or 0))
    yield request.param
    emulated.schedule(0)
