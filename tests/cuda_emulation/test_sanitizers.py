"""Runs the emulated kernels' tests once more under the address and undefined-behaviour sanitizers, in a child."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posemap_fast.ops._build import find_compiler

from .emulated_library import SANITIZE_VARIABLE

HERE = Path(__file__).resolve().parent
# Every kernel, at its edges, in about a minute. POSEMAP_SANITIZE_ALL=1 takes all tests, which is ten minutes and more.
_SAMPLE = (
    "test_sh_encode_cuda or (test_march_cuda and (few_samples or cone)) or (test_compact_cuda and nan)"
    " or (test_hash_encode_cuda and (outside or thousands or zero_and_nan))"
    " or (test_composite_cuda and (nan or behind or threshold or no_rays))"
    " or (test_fused_mlp_cuda and (nan_and_inf or small_gradients or no_rows or refused))"
    " or (test_fused_render_cuda and (nan_stays or refused))"
)


def _runtime(compiler: str, name: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.slow
def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers() -> None:
    if os.environ.get(SANITIZE_VARIABLE):
        pytest.skip("this is the child")
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    runtimes = [_runtime(compiler, name) for name in ("libasan.so", "libubsan.so")]
    if not all(Path(path).is_absolute() for path in runtimes):
        pytest.skip(f"{compiler} has no sanitizer runtimes")
    environment = os.environ | {
        SANITIZE_VARIABLE: "1",
        "LD_PRELOAD": " ".join(runtimes),
        # Leaks are Python's; the stacks of fibres look to the sanitizer like use after return.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    everything = "not sanitizers and not planted and not nvcc and not public_ops"
    wanted = everything if os.environ.get("POSEMAP_SANITIZE_ALL") else _SAMPLE
    chosen = ["-n", "2", "-k", wanted]  # these tests are single-threaded
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, str(HERE)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert result.returncode == 0, (result.stdout[-3000:], result.stderr[-3000:])
    assert " passed" in result.stdout
