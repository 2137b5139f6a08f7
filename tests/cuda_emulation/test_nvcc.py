"""The CUDA sources compile for every supported architecture without spilling registers; needs nvcc, not a GPU."""

from __future__ import annotations

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from posemap_fast.ops import _build

from .emulated_library import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = _build.find_nvcc()
    if found is None or _build.find_compiler() is None:
        pytest.skip("no nvcc or no C++ compiler on this machine")
    wanted = list(_build.ALL_ARCHITECTURES)
    try:
        _build._check_nvcc(found, wanted)
    except _build.BuildError as error:
        pytest.skip(str(error))
    return found


def _usage(nvcc: str, source: Path, target: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(architecture, mangled kernel) -> (registers, bytes spilled), from ptxas."""
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in _build.ALL_ARCHITECTURES]
    command = [nvcc, *_build.CUDA_FLAGS, *codes, "-Xptxas", "-v", f"-I{ROOT / 'common'}", "-c", str(source)]
    result = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found, kernel, spilled = {}, ("", ""), 0
    for line in result.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel = (entry[2], entry[1])
        elif spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(spill[1]) + int(spill[2])
        elif used := re.search(r"Used (\d+) registers", line):
            found[kernel] = (int(used[1]), spilled)
    return found


def test_every_architecture_compiles_without_spills(nvcc: str, tmp_path: Path) -> None:
    sources = _build.cuda_sources(ROOT)
    assert sources
    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda s: _usage(nvcc, s, tmp_path / f"{s.stem}.o"), sources))
    spills = {key: use for table in tables for key, use in table.items() if use[1] > 0}
    assert not spills
    built_for = {architecture for table in tables for architecture, _ in table}
    assert built_for == set(_build.ALL_ARCHITECTURES)
