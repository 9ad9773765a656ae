"""FASA's gates and their product on a CPU: float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fat_train.op.native.library import call, is_there


def handles(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this case, and a compiler that has made it."""
    return dtype == torch.float32 and is_there()


def forward(q_prime: Tensor, global_: Tensor, both_ways: bool) -> Tensor:
    """y of `interaction`."""
    y = torch.empty_like(q_prime)
    call("interaction_forward", q_prime, global_, y, both_ways, y.numel())
    return y


def grad(grad: Tensor, q_prime: Tensor, global_: Tensor, both_ways: bool) -> tuple[Tensor, Tensor]:
    """Gradients of both maps."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    of = (torch.empty_like(q_prime), torch.empty_like(global_))
    call("interaction_grad", grad, q_prime, global_, *of, both_ways, grad.numel())
    return of
