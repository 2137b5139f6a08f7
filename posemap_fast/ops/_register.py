"""Registration of ops with torch.library: schema, implementation, fake (shape) function, autograd.

Every op `posemap_fast::<name>` has one Python implementation that chooses between the native kernel and the
reference (`_faces.face_of`); a backward is an op of its own, so that `opcheck` sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["NAMESPACE", "define_op"]

NAMESPACE = "posemap_fast"
_library = torch.library.Library(NAMESPACE, "DEF")


def define_op(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `posemap_fast::<schema>` and return its callable.

    Args:
        schema: torch schema, e.g. `sh_encode(Tensor dirs, int degree) -> Tensor`.
        implementation: chooses the face, native or reference, by the tensors' device.
        fake: same signature, returns empty tensors of the right shape and dtype.
        setup_context, backward: as for `torch.library.register_autograd`; both or neither.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
