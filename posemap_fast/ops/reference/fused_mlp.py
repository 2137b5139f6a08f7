"""Reference of `ops.fused_mlp` in plain torch: the oracle and the fallback; any float dtype, autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.nn import functional as F

__all__ = ["fused_mlp", "fused_mlp_gradients", "joined_input", "split_params"]


def split_params(params: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """The weight matrices inside `params`: views W_l of shape (dims[l+1], dims[l]), in order."""
    shapes = [(n_out, n_in) for n_in, n_out in itertools.pairwise(dims)]
    parts = params.split([n_out * n_in for n_out, n_in in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def joined_input(x: torch.Tensor, extra: torch.Tensor | None, extra_index: torch.Tensor | None) -> torch.Tensor:
    """Rows [x_i, extra_i], or [x_i, extra_{index_i}]: (n, dims[0])."""
    if extra is None:
        return x
    return torch.cat([x, extra if extra_index is None else extra.index_select(0, extra_index)], dim=1)


def fused_mlp(
    x: torch.Tensor,
    params: torch.Tensor,
    dims: Sequence[int],
    extra: torch.Tensor | None = None,
    extra_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """h_0 = [x, extra], h_{l+1} = relu(W_l h_l), y = W_{L-1} h_{L-1}; (n, dims[0]) -> (n, dims[-1])."""
    x = joined_input(x, extra, extra_index)
    *hidden, last = split_params(params, dims)
    for weight in hidden:
        x = F.relu(F.linear(x, weight))
    return F.linear(x, last)


def fused_mlp_gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    params: torch.Tensor,
    dims: Sequence[int],
    extra: torch.Tensor | None = None,
    extra_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of sum(grad * y) in x, extra and params by the chain rule.

    Written out because the fallback runs inside an op, below autograd's dispatch key, where nothing is recorded.
    Tests judge it, like the native kernel, by autograd over `fused_mlp`.
    """
    weights = split_params(params, dims)
    activations = [joined_input(x, extra, extra_index)]
    for weight in weights[:-1]:
        activations.append(F.relu(F.linear(activations[-1], weight)))
    grad_weights = []
    for layer in reversed(range(len(weights))):
        grad_weights.append((grad.t() @ activations[layer]).flatten())
        grad = grad @ weights[layer]
        if layer > 0:
            grad = torch.where(activations[layer] <= 0, 0, grad)  # a NaN activation lets its gradient through
    grad_params = torch.cat(grad_weights[::-1])
    if extra is None:
        return grad, None, grad_params
    grad_x, grad_extra = grad.split([x.shape[1], extra.shape[1]], dim=1)
    if extra_index is not None:
        grad_extra = torch.zeros_like(extra).index_add_(0, extra_index, grad_extra)
    return grad_x, grad_extra, grad_params
