"""Real spherical harmonics in plain torch: the oracle of `ops.sh_encode` and its fallback."""

from __future__ import annotations

import math

import torch

__all__ = ["sh_encode", "sh_encode_gradient"]


def _norm(numerator: float, denominator: float) -> float:
    return math.sqrt(numerator / (denominator * math.pi))


def sh_encode(dirs: torch.Tensor, degree: int) -> torch.Tensor:
    """Bands 0 to degree - 1 for directions (n, 3); order, signs and normalisation as tiny-cuda-nn's.

    The constants are written as their closed forms, sqrt of rationals over pi. Differentiable by autograd.
    """
    x, y, z = dirs.unbind(-1)
    bands = [
        [torch.full_like(x, _norm(1, 4))],
        [-_norm(3, 4) * y, _norm(3, 4) * z, -_norm(3, 4) * x],
        [
            _norm(15, 4) * x * y,
            -_norm(15, 4) * y * z,
            _norm(5, 16) * (3 * z**2 - 1),
            -_norm(15, 4) * x * z,
            _norm(15, 16) * (x**2 - y**2),
        ],
        [
            _norm(35, 32) * y * (y**2 - 3 * x**2),
            _norm(105, 4) * x * y * z,
            _norm(21, 32) * y * (1 - 5 * z**2),
            _norm(7, 16) * z * (5 * z**2 - 3),
            _norm(21, 32) * x * (1 - 5 * z**2),
            _norm(105, 16) * z * (x**2 - y**2),
            _norm(35, 32) * x * (3 * y**2 - x**2),
        ],
    ]
    return torch.stack([value for band in bands[:degree] for value in band], dim=-1)


def sh_encode_gradient(grad: torch.Tensor, dirs: torch.Tensor, degree: int) -> torch.Tensor:
    """Gradient (n, 3) in the directions for a cotangent (n, degree**2); what autograd finds, where it does not record.

    Row k of the table is the gradient of function k, the derivative of the polynomial in `sh_encode`.
    """
    x, y, z = dirs.unbind(-1)
    zero = torch.zeros_like(x)
    one = torch.ones_like(x)
    bands: list[list[tuple[float, tuple[torch.Tensor, ...]]]] = [
        [(0.0, (zero, zero, zero))],
        [(-_norm(3, 4), (zero, one, zero)), (_norm(3, 4), (zero, zero, one)), (-_norm(3, 4), (one, zero, zero))],
        [
            (_norm(15, 4), (y, x, zero)),
            (-_norm(15, 4), (zero, z, y)),
            (_norm(5, 16), (zero, zero, 6 * z)),
            (-_norm(15, 4), (z, zero, x)),
            (_norm(15, 16), (2 * x, -2 * y, zero)),
        ],
        [
            (_norm(35, 32), (-6 * x * y, 3 * y**2 - 3 * x**2, zero)),
            (_norm(105, 4), (y * z, x * z, x * y)),
            (_norm(21, 32), (zero, 1 - 5 * z**2, -10 * y * z)),
            (_norm(7, 16), (zero, zero, 15 * z**2 - 3)),
            (_norm(21, 32), (1 - 5 * z**2, zero, -10 * x * z)),
            (_norm(105, 16), (2 * x * z, -2 * y * z, x**2 - y**2)),
            (_norm(35, 32), (3 * y**2 - 3 * x**2, 6 * x * y, zero)),
        ],
    ]
    jacobian = [factor * torch.stack(partials, dim=-1) for band in bands[:degree] for factor, partials in band]
    return torch.einsum("nk,nkd->nd", grad, torch.stack(jacobian, dim=1)).contiguous()
