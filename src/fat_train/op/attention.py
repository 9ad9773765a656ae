"""Attention of many queries to few keys: softmax(q · kᵀ / √D) · v."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from fat_train.op.choice import compute_dtype, kernels_of, way_of
from fat_train.op.native import attention as native

Shape = tuple[int, ...]


def attention(
    q: Float[Tensor, "B M L D"], k: Float[Tensor, "B M N D"], v: Float[Tensor, "B M N D"]
) -> Float[Tensor, "B M L D"]:
    """Every query's mean of the values, weighed by the softmax of its products with the keys over √D.

    Heads are views of channels-last maps: the D numbers of a head lie side by side. The result is laid out as `q` is.
    """
    dtype = compute_dtype(q)

    def can(way: str) -> bool:
        return way == "sdpa" or native.handles(dtype, q, k, v)

    unmeasured = "native" if q.device.type == "cpu" else "sdpa"
    way = way_of("attention", q, (*q.shape, k.shape[2]), can, unmeasured, otherwise="sdpa")
    if way == "torch":
        return plain(q, k, v)
    if way == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return _forward(q, k, v)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition."""
    return (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


@custom_op("fat_train::attention", mutates_args=(), device_types=("cpu",))
def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernels_of(q, "attention").forward(q, k, v)


@custom_op("fat_train::attention_grad", mutates_args=(), device_types=("cpu",))
def _grad(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are computed again from q and k: cheaper than keeping [B, M, L, N] numbers."""
    return kernels_of(q, "attention").grad(grad, q, k, v)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@_grad.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _grad(grad, *ctx.saved_tensors)


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fat_train.attention)
def _flops(q_shape: Shape, k_shape: Shape, *_: Any, **__: Any) -> int:
    """Two products of every query with every key."""
    batch, heads, queries, depth = q_shape
    return 4 * batch * heads * queries * k_shape[2] * depth


@register_flop_formula(torch.ops.fat_train.attention_grad)
def _grad_flops(grad_shape: Shape, q_shape: Shape, k_shape: Shape, *_: Any, **__: Any) -> int:
    """Five: the scores again, and four for the gradients."""
    del grad_shape
    return 5 * _flops(q_shape, k_shape) // 2
