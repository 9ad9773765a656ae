"""Kernels for CPUs in C++, compiled for this very processor by the system's compiler when they are first used."""

from __future__ import annotations

import torch
from torch import Tensor


def handles_depthwise(dtype: torch.dtype, kernel_size: int, stride: int) -> bool:
    """Whether there is a kernel for this case, and a compiler that has made it."""
    del kernel_size, stride
    return dtype == torch.float32 and is_there()


def handles_attention(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a kernel for this case, and a compiler that has made it."""
    del q, k, v
    return dtype == torch.float32 and is_there()


def is_there() -> bool:
    """Whether the kernels could be built here."""
    return False
