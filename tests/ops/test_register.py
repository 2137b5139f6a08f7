"""Eager calls run below the dispatcher; whoever traces or fakes still sees the registered op."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from posemap_fast.ops import MLPSpec, fused_mlp
from posemap_fast.seeding import step_generator

SPEC = MLPSpec((4, 8, 2))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    rng = step_generator(0, "register")
    return torch.randn(5, 4, generator=rng), torch.randn(SPEC.n_params, generator=rng)


class Seen(TorchDispatchMode):
    """Notes the names of the ops that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_and_its_backward() -> None:
    x, params = inputs()
    with Seen() as seen:
        fused_mlp(x, params.requires_grad_(), SPEC).sum().backward()
    assert "posemap_fast.fused_mlp.default" in seen.names
    assert "posemap_fast.fused_mlp_backward.default" in seen.names


def test_a_trace_holds_the_op_and_fake_tensors_pass_through_it() -> None:
    x, params = inputs()
    graph = make_fx(lambda a, b: fused_mlp(a, b, SPEC))(x, params)
    assert torch.ops.posemap_fast.fused_mlp.default in [node.target for node in graph.graph.nodes]
    with FakeTensorMode() as mode:
        assert fused_mlp(mode.from_tensor(x), mode.from_tensor(params), SPEC).shape == (5, 2)


def test_a_profile_names_the_op() -> None:
    x, params = inputs()
    with torch.profiler.profile() as profile:
        fused_mlp(x, params.requires_grad_(), SPEC)
    names = [event.key.removeprefix("posemap_fast::") for event in profile.key_averages()]  # torch before 2.5 keeps it
    assert "fused_mlp" in names
