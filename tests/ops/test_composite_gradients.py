"""Compositing, gradients: oracle, finite differences, each output alone, what is skipped, registration."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from posemap_fast.errors import BackendError
from posemap_fast.ops import _library
from posemap_fast.ops._faces import cpu_face
from posemap_fast.ops.composite import composite
from posemap_fast.ops.reference import composite as reference
from posemap_fast.seeding import step_generator

composite_module = importlib.import_module("posemap_fast.ops.composite")  # the package re-exports the function

INPUTS = ("sigmas", "t_starts", "t_ends", "rgbs", "features")
OUTPUTS = ("rgb", "depth", "opacity", "features", "weights")
COUNTS = [0, 3, 1, 0, 0, 32, 33, 290, 0]
Tensors = list[torch.Tensor]


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and _library.cpu_library() is None:
        pytest.skip("no native library: no C++ compiler on this machine")
    with _library.use_backend(request.param):
        yield request.param


def make_inputs(counts: list[int], channels: int, dtype: torch.dtype, density: float) -> tuple[Tensors, torch.Tensor]:
    """(sigmas, t_starts, t_ends, rgbs, features) and ray_offsets."""
    g, m = step_generator(len(counts), f"composite_gradients/{channels}"), sum(counts)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    intervals = torch.cat([draw(2 * c).sort().values.view(-1, 2) for c in counts])
    values = [draw(m) * density, *intervals.unbind(1), draw(m, 3), draw(m, channels) * 2 - 1]
    return [v.to(dtype).contiguous() for v in values], torch.tensor([0, *counts]).cumsum(0)


def gradients(function: Any, inputs: Tensors, cotangents: Tensors, dtype: torch.dtype) -> Tensors:
    leaves = [v.detach().clone().to(dtype).requires_grad_() for v in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, [c.to(dtype) for c in cotangents]))


def run(inputs: Any, offsets: torch.Tensor, eps: float) -> tuple[torch.Tensor, ...]:
    sigmas, t_starts, t_ends, rgbs, features = inputs
    return composite(sigmas, t_starts, t_ends, rgbs, offsets, features, early_stop_eps=eps)


def cotangents_of(inputs: Tensors, offsets: torch.Tensor) -> Tensors:
    g = step_generator(0, "cotangents")
    return [torch.randn(o.shape, generator=g, dtype=torch.float64) for o in run(inputs, offsets, 0.0)]


@pytest.mark.parametrize("channels", [0, 1, 3, 31, 32, 33, 64, 256])
@pytest.mark.parametrize(("density", "eps"), [(3.0, 0.0), (300.0, 1e-3)], ids=["all", "early_stop"])
def test_native_gradients_equal_autograd_of_the_reference(channels: int, density: float, eps: float) -> None:
    inputs, offsets = make_inputs(COUNTS, channels, torch.float64, density)
    cotangents = cotangents_of(inputs, offsets)
    want = gradients(lambda *v: reference.composite(*v, offsets, eps), inputs, cotangents, torch.float64)
    got = gradients(lambda *v: run(v, offsets, eps), inputs, cotangents, torch.float64)
    for name, a, b in zip(INPUTS, got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        is_dropped = run(inputs, offsets, eps)[4] == 0
    assert bool(is_dropped.any()) == (eps > 0) and all((grad[is_dropped] == 0).all() for grad in got)


def test_the_fallbacks_written_gradient_equals_autograd_of_the_reference() -> None:
    inputs, offsets = make_inputs(COUNTS, 5, torch.float64, 300.0)
    cotangents = cotangents_of(inputs, offsets)
    want = gradients(lambda *v: reference.composite(*v, offsets, 1e-3), inputs, cotangents, torch.float64)
    got = reference.composite_backward(cotangents, *inputs, offsets, 1e-3)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("channels", [0, 3, 33, 256])
def test_float32_gradients_are_as_good_as_plain_torch(channels: int, backend: str) -> None:
    """Error against the float64 oracle at most twice that of autograd over the packed form in float32."""
    inputs, offsets = make_inputs(COUNTS, channels, torch.float32, 20.0)
    cotangents = cotangents_of(inputs, offsets)
    want = gradients(lambda *v: reference.composite(*v, offsets, 0.0), inputs, cotangents, torch.float64)
    plain = gradients(lambda *v: reference.composite_packed(*v, offsets), inputs, cotangents, torch.float32)
    got = gradients(lambda *v: run(v, offsets, 0.0), inputs, cotangents, torch.float32)
    for name, a, b, w in zip(INPUTS, got, plain, want, strict=True):
        if w.numel():
            ours, theirs = float((a - w).abs().max()), float((b - w).abs().max())
            assert ours <= 2 * theirs + 1e-6 * float(w.abs().max()), f"{name}: {ours:.1e} against {theirs:.1e}"


@pytest.mark.parametrize("eps", [0.0, 0.05], ids=["all", "early_stop"])
@pytest.mark.parametrize("channels", [0, 2])
def test_gradcheck_through_all_outputs(channels: int, eps: float, backend: str) -> None:
    inputs, offsets = make_inputs([0, 3, 1, 0, 4], channels, torch.float64, 6.0)
    leaves = [v.requires_grad_() for v in inputs]
    assert torch.autograd.gradcheck(lambda *v: tuple(run(v, offsets, eps)), leaves, fast_mode=False)


@pytest.mark.parametrize("output", OUTPUTS)
def test_each_output_alone_sends_its_gradient_to_every_input(output: str, backend: str) -> None:
    """The other cotangents are None then: nothing may be read for them, and nothing be missing."""
    inputs, offsets = make_inputs(COUNTS, 5, torch.float64, 3.0)
    index = OUTPUTS.index(output)
    cotangent = cotangents_of(inputs, offsets)[index]

    def grads(outputs: Any, leaves: Tensors) -> Tensors:
        return list(torch.autograd.grad(outputs[index], leaves, cotangent, allow_unused=True))

    leaves = [v.clone().requires_grad_() for v in inputs]
    got = grads(run(leaves, offsets, 0.0), leaves)
    want = grads(reference.composite(*leaves, offsets, 0.0), leaves)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 4), (1, 3)])
def test_any_subset_of_inputs_may_require_grad(wanted: tuple[int, ...], backend: str) -> None:
    inputs, offsets = make_inputs(COUNTS, 16, torch.float64, 3.0)
    cotangents = cotangents_of(inputs, offsets)
    want = gradients(lambda *v: reference.composite(*v, offsets, 0.0), inputs, cotangents, torch.float64)
    leaves = [v.clone().requires_grad_(i in wanted) for i, v in enumerate(inputs)]
    torch.autograd.backward(run(leaves, offsets, 0.0), cotangents)
    for i, leaf in enumerate(leaves):
        if i in wanted:
            torch.testing.assert_close(leaf.grad, want[i], rtol=1e-10, atol=1e-11)
        else:
            assert leaf.grad is None


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    kernel = composite_module._backward_op
    monkeypatch.setattr(composite_module, "_backward_op", lambda *a: (asked.append(a[-1]), kernel(*a))[1])
    (sigmas, t_starts, t_ends, rgbs, features), offsets = make_inputs([3, 4], 8, torch.float32, 3.0)
    sigmas, features = sigmas.requires_grad_(), features.requires_grad_()
    out = composite(sigmas, t_starts, t_ends, rgbs, offsets, features)
    out.rgb.sum().backward(retain_graph=True)
    assert asked == [[True, False, False, False, False]] and features.grad is None
    out.features.sum().backward()
    assert asked[1] == [True, False, False, False, True] and features.grad is not None


def test_large_gradients_take_the_streaming_path_with_the_same_result() -> None:
    """From 16 MiB on rows are written past the caches; 16 384 samples x 256 channels is 16 MiB."""
    inputs, offsets = make_inputs([512] * 32, 256, torch.float32, 1.0)
    cotangents = [torch.zeros_like(o) for o in run(inputs, offsets, 0.0)]
    cotangents[3].uniform_(generator=step_generator(0, "stream"))
    leaves = [v.clone().requires_grad_() for v in inputs]
    out = run(leaves, offsets, 0.0)
    torch.autograd.backward(out, cotangents)
    rows = reference.ray_indices(offsets)
    torch.testing.assert_close(leaves[4].grad, out[4].detach()[:, None] * cotangents[3][rows], rtol=1e-6, atol=1e-9)


def test_gradients_repeat_bit_for_bit_and_ignore_strides() -> None:
    inputs, offsets = make_inputs([40, 0, 90] * 40, 48, torch.float32, 5.0)
    cotangents = cotangents_of(inputs, offsets)
    strided = [torch.stack([v, v], -1)[..., 0] for v in inputs]
    first, second, third = (
        gradients(lambda *v: run(v, offsets, 1e-4), x, cotangents, torch.float32) for x in (inputs, inputs, strided)
    )
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_nan_and_huge_densities_keep_their_gradients_on_their_ray(dtype: torch.dtype, backend: str) -> None:
    inputs, offsets = make_inputs([20, 20, 20, 20], 3, dtype, 3.0)
    inputs[0][25], inputs[0][45] = math.nan, 1e30
    cotangents = cotangents_of(inputs, offsets)
    for grad in gradients(lambda *v: run(v, offsets, 0.0), inputs, cotangents, dtype):
        assert grad[:20].isfinite().all() and grad[40:].isfinite().all()


@pytest.mark.parametrize("channels", [0, 5, 32])
def test_gradients_are_written_in_bounds(channels: int) -> None:
    """Sentinels around every gradient buffer survive."""
    if _library.cpu_library() is None:
        pytest.skip("no native library")
    inputs, offsets = make_inputs(COUNTS, channels, torch.float64, 300.0)
    cotangents = cotangents_of(inputs, offsets)
    want = gradients(lambda *v: run(v, offsets, 1e-3), inputs, cotangents, torch.float64)
    weights = run(inputs, offsets, 1e-3)[4]
    buffers = [torch.full((v.numel() + 32,), -7.0, dtype=torch.float64) for v in inputs]
    fixed = (*inputs, offsets, weights, *cotangents)
    sizes = (len(COUNTS), sum(COUNTS), channels, channels, 1e-3)
    cpu_face().run("pmf_composite_backward_cpu_f64", torch.empty(0), *fixed, *(b[16:] for b in buffers), *sizes)
    for buffer, value in zip(buffers, want, strict=True):
        assert torch.equal(buffer[16:-16], value.flatten())
        assert (buffer[:16] == -7).all() and (buffer[-16:] == -7).all()


def test_no_rays_and_no_samples_have_empty_gradients(backend: str) -> None:
    for counts in ([], [0, 0]):
        inputs = [torch.zeros(0, *s, requires_grad=True) for s in ((), (), (), (3,), (4,))]
        out = run(inputs, torch.tensor([0, *counts]), 1e-4)
        sum(o.sum() for o in out).backward()
        assert all(v.grad is not None and v.grad.shape == v.shape for v in inputs)


def test_a_second_derivative_is_refused_not_wrong(backend: str) -> None:
    inputs, offsets = make_inputs([3], 2, torch.float64, 3.0)
    leaves = [v.requires_grad_() for v in inputs]
    out = run(leaves, offsets, 0.0)
    (grad,) = torch.autograd.grad(out[0].square().sum(), leaves[0], create_graph=True)
    with pytest.raises(BackendError, match=r"composite: .* once"):
        grad.sum().backward()


@pytest.mark.parametrize("channels", [0, 4])
def test_registration_passes_opcheck(channels: int, backend: str) -> None:
    inputs, offsets = make_inputs([2, 0, 5], channels, torch.float64, 3.0)
    cotangents = cotangents_of(inputs, offsets)
    weights = run(inputs, offsets, 0.0)[4]
    leaves = [v.clone().requires_grad_() for v in inputs]
    torch.library.opcheck(torch.ops.posemap_fast.composite.default, (*leaves, offsets, 0.0))
    for needs in ([True] * 5, [False, True, False, False, True]):
        arguments = (*cotangents, *inputs, offsets, weights, 0.0, needs)
        torch.library.opcheck(torch.ops.posemap_fast.composite_backward.default, arguments)
