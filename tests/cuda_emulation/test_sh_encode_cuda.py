"""Spherical harmonics kernels under the host emulation against the oracle in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posemap_fast.ops.reference import sh_encode as reference
from posemap_fast.seeding import step_generator

from .guarded import Guarded

COUNTS = [0, 1, 31, 32, 33, 127, 128, 129, 700]  # a block takes 128 directions


def draw(n: int, degree: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Directions, some of them not of unit length, and a cotangent."""
    g = step_generator(n, f"sh_encode_cuda/{degree}")
    dirs = torch.randn(n, 3, generator=g, dtype=torch.float64)
    dirs[::2] = torch.nn.functional.normalize(dirs[::2], dim=-1)
    return dirs.to(dtype), torch.randn(n, degree**2, generator=g, dtype=torch.float64).to(dtype)


def run(emulated: Any, dirs: torch.Tensor, grad: torch.Tensor, degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    memory = Guarded()
    out = memory.new(len(dirs), degree**2, dtype=dirs.dtype)
    grad_dirs = memory.new(len(dirs), 3, dtype=dirs.dtype)
    suffix = "f32" if dirs.dtype == torch.float32 else "f64"
    emulated.call(f"pmf_sh_encode_cuda_{suffix}", dirs, len(dirs), degree, out)
    emulated.call(f"pmf_sh_encode_backward_cuda_{suffix}", dirs, len(dirs), degree, grad, grad_dirs)
    memory.expect_clean_margins()
    return out, grad_dirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_value_and_gradient_equal_the_oracle(emulated: Any, schedule: Any, degree: int, dtype: torch.dtype) -> None:
    for n in COUNTS:
        dirs, grad = draw(n, degree, dtype)
        out, grad_dirs = run(emulated, dirs, grad, degree)
        want = reference.sh_encode(dirs.double(), degree)
        want_dirs = reference.sh_encode_gradient(grad.double(), dirs.double(), degree)
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6  # relative to the largest of a row: terms cancel
        for got, expected in ((out, want), (grad_dirs, want_dirs)):
            size = 1 + dirs.double().norm(dim=-1, keepdim=True) ** 3
            torch.testing.assert_close(got.double() / size, expected / size, rtol=0, atol=40 * tolerance)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_hostile_directions_stay_in_their_rows(emulated: Any, schedule: Any, degree: int) -> None:
    dirs, grad = draw(200, degree, torch.float32)
    clean = run(emulated, dirs, grad, degree)
    dirs[5], dirs[130, 1], dirs[131] = torch.nan, torch.inf, 1e30
    grad[140] = torch.nan
    spoiled = run(emulated, dirs, grad, degree)
    others = torch.ones(200, dtype=torch.bool)
    others[[5, 130, 131]] = False
    assert torch.equal(spoiled[0][others], clean[0][others])
    others[140] = False
    assert torch.equal(spoiled[1][others], clean[1][others])
    assert bool((spoiled[0][:, 0] == clean[0][:, 0]).all()) and bool(spoiled[0][5, 1:].isnan().all())


def test_unknown_degrees_are_refused(emulated: Any) -> None:
    dirs, out = torch.zeros(2, 3), torch.zeros(2, 25)
    for degree in (0, 5, -1):
        assert emulated.status("pmf_sh_encode_cuda_f32", dirs, 2, degree, out) == 1
        assert emulated.status("pmf_sh_encode_backward_cuda_f32", dirs, 2, degree, out, dirs) == 1
