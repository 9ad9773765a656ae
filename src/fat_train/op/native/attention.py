"""Attention on a CPU: float32, heads of 16, 32 or 64 channels."""

from __future__ import annotations

import torch
from torch import Tensor

from fat_train.op.native.library import call, is_there

DEPTHS = (16, 32, 64)
MOST_KEYS = 1024
"""So that a few rows of scores, and the keys, stay in the first caches."""


def handles(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for this case, and a compiler that has made it."""
    return (
        dtype == torch.float32
        and q.shape[3] in DEPTHS
        and 0 < k.shape[2] <= MOST_KEYS
        and all(view.stride(3) == 1 for view in (q, k, v))
        and is_there()
    )


def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Out, laid out as `q`."""
    out = torch.empty_like(q)
    call("attention_forward", q, k, v, out, q.shape[3], _sizes(q, k), *map(_strides, (q, k, v, out)))
    return out


def grad(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    of = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    call("attention_grad", grad, q, k, v, *of, q.shape[3], _sizes(q, k), *map(_strides, (grad, q, k, v, *of)))
    return of


def _sizes(q: Tensor, k: Tensor) -> list[int]:
    return [*q.shape[:3], k.shape[2]]


def _strides(view: Tensor) -> list[int]:
    return list(view.stride()[:3])
