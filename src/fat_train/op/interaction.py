"""The element-wise part of FASA: both branches' SiLU and the gates between them, one pass over two maps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op

from fat_train.op.choice import FUSED_DTYPES, compute_dtype, kernels_of, way_of
from fat_train.op.layout import is_channels_last
from fat_train.op.native import interaction as native


def interaction(
    q_prime: Float[Tensor, "B C H W"], global_: Float[Tensor, "B C H W"], both_ways: bool
) -> Float[Tensor, "B C H W"]:
    """SiLU(X'_global) ⊙ X'_local with X'_local = SiLU(Q'); `both_ways` times Sigmoid(X'_local) (Eq. 8 to 11 of FAT).

    The kernel keeps Q' and X'_global alone for the backward pass, where the definition keeps four maps.
    """
    dtype = compute_dtype(q_prime)

    def can(way: str) -> bool:
        if not (is_channels_last(q_prime) and is_channels_last(global_)):
            return False
        return native.handles(dtype) if way == "native" else dtype in FUSED_DTYPES

    if way_of("interaction", q_prime, (*q_prime.shape, both_ways), can, unmeasured="native") == "torch":
        return plain(q_prime, global_, both_ways)
    return _forward(q_prime.to(dtype), global_.to(dtype), both_ways)


def plain(q_prime: Tensor, global_: Tensor, both_ways: bool) -> Tensor:
    """The definition."""
    local = F.silu(q_prime)
    y = F.silu(global_) * local
    return y * local.sigmoid() if both_ways else y


@custom_op("fat_train::interaction", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(q_prime: Tensor, global_: Tensor, both_ways: bool) -> Tensor:
    return kernels_of(q_prime, "interaction").forward(q_prime, global_, both_ways)


@custom_op("fat_train::interaction_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _grad(grad: Tensor, q_prime: Tensor, global_: Tensor, both_ways: bool) -> tuple[Tensor, Tensor]:
    return kernels_of(q_prime, "interaction").grad(grad, q_prime, global_, both_ways)


@_forward.register_fake
def _(q_prime: Tensor, global_: Tensor, both_ways: bool) -> Tensor:
    return torch.empty_like(q_prime)


@_grad.register_fake
def _(grad: Tensor, q_prime: Tensor, global_: Tensor, both_ways: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_prime), torch.empty_like(global_)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    q_prime, global_, ctx.both_ways = inputs
    ctx.save_for_backward(q_prime, global_)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grad(grad, *ctx.saved_tensors, ctx.both_ways), None


_forward.register_autograd(_backward, setup_context=_save)
