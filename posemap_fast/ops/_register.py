"""Registration of ops with torch.library: schema, implementation, fake (shape) function, autograd.

Every op `posemap_fast::<name>` has one Python implementation that chooses between the native kernel and the
reference (`_faces.face_of`); a backward is an op of its own, so that `opcheck` sees it.

Eager calls on plain tensors do not go through the dispatcher: an op in Python crosses it four times, which in a
training step (caches full of samples, not of interpreter) costs as much as a small kernel. They run the same
implementation below the same autograd formula; whoever needs to see the op (torch.compile, tracing, dispatch modes,
torch.func, tensor subclasses) still gets it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["NAMESPACE", "define_op"]

NAMESPACE = "posemap_fast"
_library = torch.library.Library(NAMESPACE, "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `posemap_fast::<schema>` and return its callable (positional arguments only).

    Args:
        schema: torch schema, e.g. `sh_encode(Tensor dirs, int degree) -> Tensor`.
        implementation: chooses the face, native or reference, by the tensors' device.
        fake: same signature, returns empty tensors of the right shape and dtype.
        setup_context, backward: as for `torch.library.register_autograd`.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    differentiable = None if backward is None else _function(name, implementation, setup_context, backward)

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not _is_eager(arguments):
            return op(*arguments)
        if differentiable is None or not torch.is_grad_enabled() or not _any_requires_grad(arguments):
            return implementation(*arguments)
        return differentiable(*arguments)

    return call


def _function(
    name: str,
    implementation: Callable[..., Any],
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """The same op as a `torch.autograd.Function`; the profiler shows it under the op's name."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = implementation(*arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    return function.apply


def _is_eager(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody looks over the call's shoulder: plain tensors, no mode, no transform, no trace."""
    if is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return False
    return all(type(a) in _PLAIN or not isinstance(a, torch.Tensor) for a in arguments)


def _any_requires_grad(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)
