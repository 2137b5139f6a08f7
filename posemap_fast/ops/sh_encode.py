"""Real spherical harmonics of directions, degree 1 to 4: value and gradient.

Convention: tiny-cuda-nn's order (band by band, m = -l .. l), signs and constants, for directions in [-1, 1]^3
(tiny-cuda-nn itself takes (d + 1) / 2).
"""

from __future__ import annotations

from typing import Any

import torch

from posemap_fast.checks import expect_dtype, expect_shape
from posemap_fast.errors import ShapeError
from posemap_fast.ops._faces import face_of
from posemap_fast.ops._register import define_op
from posemap_fast.ops.reference.sh_encode import sh_encode as reference_sh_encode
from posemap_fast.ops.reference.sh_encode import sh_encode_gradient as reference_gradient

__all__ = ["sh_encode"]

_MAX_DEGREE = 4


def sh_encode(dirs: torch.Tensor, degree: int) -> torch.Tensor:
    """Spherical harmonics of unit directions.

    Convention: the polynomials are evaluated as they are, nothing is normalised; the gradient is that of the
    polynomials in R^3. NaN and infinite directions give NaN or infinite values.
    Args:
        dirs: (n, 3) float32/64, unit vectors.
        degree: number of bands, 1 to 4.
    Returns:
        (n, degree**2), same dtype.
    Raises:
        ShapeError: wrong shape or dtype, or a degree outside 1 to 4.
    Differentiable once, in dirs. Reference: `ops.reference.sh_encode`.
    Example: dirs = [[0, 0, 1]], degree 2  ->  [[0.2821, 0, 0.4886, 0]]
    """
    expect_shape("sh_encode", "dirs", dirs, (None, 3))
    expect_dtype("sh_encode", "dirs", dirs, (torch.float32, torch.float64))
    if not 1 <= degree <= _MAX_DEGREE:
        raise ShapeError(f"sh_encode: degree must be 1 to {_MAX_DEGREE}; got {degree}")
    return _op(dirs, degree)


def _forward(dirs: torch.Tensor, degree: int) -> torch.Tensor:
    face = face_of(dirs)
    if face is None:
        return reference_sh_encode(dirs, degree)
    out = dirs.new_empty(len(dirs), degree**2)
    face.call("sh_encode", dirs, dirs.contiguous(), len(dirs), degree, out)
    return out


def _forward_fake(dirs: torch.Tensor, degree: int) -> torch.Tensor:
    return dirs.new_empty(dirs.shape[0], degree**2)


def _backward(grad: torch.Tensor, dirs: torch.Tensor, degree: int) -> torch.Tensor:
    face = face_of(dirs)
    if face is None:
        return reference_gradient(grad, dirs, degree)
    grad_dirs = dirs.new_empty(len(dirs), 3)
    face.call("sh_encode_backward", dirs, dirs.contiguous(), len(dirs), degree, grad.contiguous(), grad_dirs)
    return grad_dirs


def _backward_fake(grad: torch.Tensor, dirs: torch.Tensor, degree: int) -> torch.Tensor:
    return dirs.new_empty(dirs.shape[0], 3)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    dirs, ctx.degree = inputs
    ctx.save_for_backward(dirs)


def _differentiate(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None]:
    (dirs,) = ctx.saved_tensors
    return (_op_backward(grad, dirs, ctx.degree) if ctx.needs_input_grad[0] else None), None


def _refuse_twice(ctx: Any, grad: torch.Tensor) -> None:
    raise RuntimeError("sh_encode is differentiable once; its gradient has no derivative (create_graph=True was used)")


_op = define_op(
    "sh_encode(Tensor dirs, int degree) -> Tensor",
    _forward,
    _forward_fake,
    setup_context=_save,
    backward=_differentiate,
)
_op_backward = define_op(
    "sh_encode_backward(Tensor grad, Tensor dirs, int degree) -> Tensor",
    _backward,
    _backward_fake,
    backward=_refuse_twice,
)
