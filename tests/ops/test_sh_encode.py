"""sh_encode against its float64 oracle, closed forms and hostile input."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops._library import native_available, use_backend
from posemap_fast.ops.reference.sh_encode import sh_encode as reference
from posemap_fast.ops.sh_encode import sh_encode
from posemap_fast.seeding import step_generator

DEGREES = [1, 2, 3, 4]


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native" and not native_available():
        pytest.skip("no native library; run python -m posemap_fast.ops._build_cli")
    with use_backend(request.param):
        yield request.param


def directions(n, name, dtype=torch.float64):
    d = torch.randn(n, 3, generator=step_generator(0, name), dtype=torch.float64)
    return (d / d.norm(dim=-1, keepdim=True)).to(dtype)


def gradient(function, dirs, degree, cotangent):
    dirs = dirs.clone().requires_grad_()
    out = function(dirs, degree) + 0 * dirs.sum()  # degree 1 is constant: the oracle's graph would not reach dirs
    return out.detach(), torch.autograd.grad(out, dirs, cotangent)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 17, 5000])
@pytest.mark.parametrize("degree", DEGREES)
def test_value_and_gradient_equal_the_oracle(backend, degree, n, dtype):
    dirs = directions(n, "oracle", dtype)
    cotangent = torch.randn(n, degree**2, generator=step_generator(1, "oracle"), dtype=dtype)
    got = gradient(sh_encode, dirs, degree, cotangent)
    want = gradient(reference, dirs.double(), degree, cotangent.double())
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5  # float32: about 60 terms of size up to 10
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("degree", DEGREES)
def test_gradcheck_in_directions(backend, degree):
    dirs = directions(6, "gradcheck").requires_grad_()
    assert torch.autograd.gradcheck(lambda d: sh_encode(d, degree), (dirs,))


@pytest.mark.parametrize("degree", DEGREES)
def test_registration_passes_opcheck(backend, degree):
    dirs = directions(5, "opcheck")
    ops = torch.ops.posemap_fast
    torch.library.opcheck(ops.sh_encode.default, (dirs.clone().requires_grad_(), degree))
    torch.library.opcheck(ops.sh_encode_backward.default, (torch.randn(5, degree**2).double(), dirs, degree))


def test_functions_are_orthonormal_on_the_sphere(backend):
    # Products of two bands below 4 have degree <= 6: 8 Gauss nodes in z and 16 equal steps in phi are exact.
    z, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
    phi = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    radius = (1 - z**2).sqrt()
    dirs = torch.stack(
        [radius[:, None] * phi.cos(), radius[:, None] * phi.sin(), z[:, None].expand(-1, 16)], dim=-1
    ).reshape(-1, 3)
    values = sh_encode(dirs, 4)
    area = (weight[:, None].expand(-1, 16) * (2 * math.pi / 16)).reshape(-1, 1)
    torch.testing.assert_close(values.t() @ (area * values), torch.eye(16, dtype=torch.float64), atol=1e-12, rtol=0)


def test_convention_order_and_signs_are_tiny_cuda_nns(backend):
    # From the polynomials of tiny-cuda-nn: the listed entries at the axes, everything else below band 3 by symmetry.
    x, y, z = sh_encode(torch.eye(3, dtype=torch.float64), 4)
    expected = {
        "x": (x, {0: 0.28209479, 3: -0.48860251, 6: -0.31539157, 8: 0.54627422, 13: 0.45704580, 15: -0.59004359}),
        "y": (y, {0: 0.28209479, 1: -0.48860251, 6: -0.31539157, 8: -0.54627422, 9: 0.59004359, 11: 0.45704580}),
        "z": (z, {0: 0.28209479, 2: 0.48860251, 6: 0.63078313, 12: 0.74635267}),
    }
    for axis, (got, nonzero) in expected.items():
        want = torch.tensor([nonzero.get(k, 0.0) for k in range(16)], dtype=torch.float64)
        torch.testing.assert_close(got, want, atol=1e-7, rtol=0, msg=f"axis {axis}")
    diagonal = sh_encode(torch.ones(1, 3, dtype=torch.float64), 4)[0]
    mixed = {4: 1.09254843, 5: -1.09254843, 7: -1.09254843, 10: 2.89061144, 14: 0.0}
    for k, want in mixed.items():
        assert diagonal[k].item() == pytest.approx(want, abs=1e-7)


def test_lower_degrees_are_prefixes_of_higher_ones(backend):
    dirs = directions(20, "prefix")
    whole = sh_encode(dirs, 4)
    for degree in DEGREES:
        torch.testing.assert_close(sh_encode(dirs, degree), whole[:, : degree**2], rtol=1e-14, atol=1e-14)


def test_no_directions_and_degree_one_have_zero_gradient(backend):
    empty = torch.empty(0, 3, requires_grad=True)
    sh_encode(empty, 4).sum().backward()
    assert empty.grad.shape == (0, 3)
    dirs = directions(3, "one").requires_grad_()
    sh_encode(dirs, 1).sum().backward()
    assert not dirs.grad.any()


def test_strided_input_and_gradient_give_the_same(backend):
    dirs = directions(40, "strided")
    cotangent = torch.randn(40, 16, generator=step_generator(1, "strided"), dtype=torch.float64)
    want = gradient(sh_encode, dirs, 4, cotangent)
    got = gradient(sh_encode, dirs.t().contiguous().t(), 4, cotangent.t().contiguous().t())
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_nan_stays_in_its_own_row(backend):
    dirs = directions(20, "nan")
    clean = sh_encode(dirs, 4)
    dirs[7, 1] = float("nan")
    dirty = sh_encode(dirs, 4)
    others = torch.arange(20) != 7
    assert dirty[7].isnan().any()
    assert torch.equal(dirty[others], clean[others])


@pytest.mark.skipif(not native_available(), reason="no native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("degree", DEGREES)
def test_kernels_write_their_output_and_nothing_around_it(degree, dtype):
    n, margin, canary = 13, 64, 12345.0
    dirs = directions(n, "canary", dtype)
    grad = torch.ones(n, degree**2, dtype=dtype)
    for kernel, size, inputs in (("", n * degree**2, ()), ("_backward", 3 * n, (grad,))):
        buffer = torch.full((size + 2 * margin,), canary, dtype=dtype)
        out = ctypes.c_void_p(buffer.data_ptr() + margin * buffer.element_size())
        cpu_face().call(f"sh_encode{kernel}", dirs, dirs, n, degree, *inputs, out)
        assert (buffer[:margin] == canary).all()
        assert (buffer[-margin:] == canary).all()
        assert (buffer[margin:-margin] != canary).all()


def test_second_derivative_is_refused(backend):
    dirs = directions(3, "twice").requires_grad_()
    (grad,) = torch.autograd.grad(sh_encode(dirs, 3).square().sum(), dirs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_wrong_arguments_are_named():
    dirs = torch.rand(4, 3)
    cases = [
        ((torch.rand(4, 4), 2), r"dirs must have shape \(n, 3\); got \(4, 4\)"),
        ((dirs.half(), 2), "dirs must be torch.float32 or torch.float64; got torch.float16"),
        ((dirs, 0), "degree must be 1 to 4; got 0"),
        ((dirs, 5), "degree must be 1 to 4; got 5"),
    ]
    for arguments, message in cases:
        with pytest.raises(ShapeError, match=message):
            sh_encode(*arguments)
