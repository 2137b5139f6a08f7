"""The emulation is worth something only if it sees bugs: each planted one must be found."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posemap_fast.ops._build import find_compiler

from .emulated_library import ROOT, SOURCES_VARIABLE, EmulatedLibrary, EmulationError, compile_emulated, sanitized

_SCAN = """
#include "launch.h"
namespace {
// Sum of each block of 128 numbers: warps by shuffles, then the first thread over the warps' sums.
__global__ void block_sums(const float* x, int64_t n, float* out) {
  PMF_DYNAMIC_SHARED(float, part);
  const int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  float sum = i < n ? x[i] : 0.0f;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(pmf::kFullWarp, sum, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  BARRIER
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += part[w];
    out[blockIdx.x] = total;
  }
}
}
PMF_EXPORT int block_sums_of(const float* x, int64_t n, float* out, void* stream) {
  return PMF_LAUNCH((block_sums), pmf::blocks_for(n, 128), 128, 4 * sizeof(float), stream, x, n, out);
}
"""
_RIGHT = {"BARRIER": "__syncthreads();"}


@pytest.fixture
def compiled(tmp_path: Path):
    """Compiles a source text."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")

    def build(text: str) -> EmulatedLibrary:
        source = tmp_path / "planted_cuda.cu"
        source.write_text(text)
        target = tmp_path / "planted.so"
        compile_emulated([source], target)
        return EmulatedLibrary(target)

    return build


def _wrong_schedules(library: EmulatedLibrary) -> list[str]:
    """Names of the schedules under which the sums are wrong or a rule is broken."""
    x = torch.arange(300.0)
    want = torch.stack([part.sum() for part in x.split(128)])
    found = []
    for name, kind, seed in (("forward", 0, 0), ("reverse", 1, 0), ("random", 2, 5)):
        library.schedule(kind, seed)
        out = torch.full((3,), float("nan"))
        try:
            library.call("block_sums_of", x, 300, out)
        except EmulationError as error:
            found.append(f"{name}: {error}")
            continue
        if not torch.equal(out, want):
            found.append(name)
    return found


def _source(**changes: str) -> str:
    text = _SCAN
    for key, value in (_RIGHT | changes).items():
        text = text.replace(key, value)
    return text


def test_the_right_kernel_is_right_under_every_schedule(compiled) -> None:
    assert _wrong_schedules(compiled(_source())) == []


def test_missing_barrier_is_found(compiled) -> None:
    assert _wrong_schedules(compiled(_source(BARRIER="")))


def test_barrier_that_not_every_thread_reaches_is_found(compiled) -> None:
    found = _wrong_schedules(compiled(_source(BARRIER="if (threadIdx.x < 64) __syncthreads();")))
    assert len(found) == 3 and all("not reached by every thread" in text for text in found)


def test_off_by_one_at_the_edge_of_a_warp_is_found(compiled) -> None:
    wrong = _source().replace("threadIdx.x % 32 == 0", "threadIdx.x % 33 == 0")
    assert _wrong_schedules(compiled(wrong))


def test_wrong_stride_is_found(compiled) -> None:
    wrong = _source().replace("blockIdx.x * static_cast<int64_t>(blockDim.x)", "blockIdx.x * static_cast<int64_t>(127)")
    assert _wrong_schedules(compiled(wrong))


def test_lane_missing_from_a_shuffle_is_found(compiled) -> None:
    wrong = _source().replace("for (int step = 16;", "if (threadIdx.x != 40) for (int step = 16;")
    assert len(_wrong_schedules(compiled(wrong))) == 3


# The same three kinds of bug in the product's own kernels: where, what is replaced by what, and whose tests must fail.
IN_PRODUCT = {
    "missing barrier": (
        "sh_encode/sh_encode_cuda.cu",
        "    __syncthreads();\n    for (int k = t;",
        "    for (int k = t;",
    ),
    "off by one at a warp's edge": (
        "composite/composite_warp_cuda.h",
        "    if (lane >= step) value *= other;",
        "    if (lane > step) value *= other;",
    ),
    "wrong stride": ("sh_encode/sh_encode_cuda.cu", "k / SIZE * STRIDE + k % SIZE", "k / SIZE * SIZE + k % SIZE"),
}


def _run_tests(op: str, sources: Path) -> subprocess.CompletedProcess[str]:
    """The emulation tests of an op in a child process, on other sources."""
    tests = Path(__file__).with_name(f"test_{op}_cuda.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(tests)]
    environment = os.environ | {SOURCES_VARIABLE: str(sources), "PMF_CACHE_DIR": str(sources.parent / "cache")}
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=root)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PRODUCT)
def test_bug_planted_in_a_product_kernel_is_found_by_its_tests(name: str, tmp_path: Path) -> None:
    if sanitized() or find_compiler() is None:
        pytest.skip("needs a C++ compiler and a process without preloaded sanitizers")
    file, right, wrong = IN_PRODUCT[name]
    op = file.split("/")[0]
    sources = tmp_path / "cuda_ext"
    for folder in ("common", "emulation", op):
        shutil.copytree(ROOT / folder, sources / folder)
    text = (sources / file).read_text()
    assert text.count(right) == 1, f"{file} has changed: plant the bug elsewhere"
    (sources / file).write_text(text.replace(right, wrong))
    result = _run_tests(op, sources)
    assert result.returncode == 1 and " failed" in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]
    assert "AssertionError" in result.stdout  # a wrong number or a broken rule, not a source that does not compile
