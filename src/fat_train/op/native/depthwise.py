"""Depth-wise convolution on a CPU: float32, kernels of 3, 5, 7, 9, strides 1 and 2."""

from __future__ import annotations

import torch
from torch import Tensor

from fat_train.op.layout import empty_map
from fat_train.op.native.library import call, is_there

KERNEL_SIZES = (3, 5, 7, 9)


def handles(dtype: torch.dtype, kernel_size: int, stride: int) -> bool:
    """Whether there is a kernel for this case, and a compiler that has made it."""
    return dtype == torch.float32 and kernel_size in KERNEL_SIZES and stride in (1, 2) and is_there()


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    """y of `depthwise_conv`."""
    batch, channels, height, width = x.shape
    y = empty_map(x, batch, channels, -(-height // stride), -(-width // stride))
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    call("depthwise_forward", _map(x), weight, bias, y, [*x.shape], weight.shape[-1], stride, residual)
    return y


def input_grad(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool) -> Tensor:
    """Gradient of x."""
    batch, channels = grad.shape[:2]
    grad_x, sizes = empty_map(grad, batch, channels, height, width), [batch, channels, height, width]
    weight = weight.contiguous()
    call("depthwise_input_grad", _map(grad), weight, grad_x, sizes, weight.shape[-1], stride, residual)
    return grad_x


def weight_grad(grad: Tensor, x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Gradients of weight [C, 1, k, k] and bias [C]."""
    of_weight, of_bias = x.new_empty(x.shape[1], 1, kernel_size, kernel_size), x.new_empty(x.shape[1])
    call("depthwise_weight_grad", _map(x), _map(grad), of_weight, of_bias, [*x.shape], kernel_size, stride)
    return of_weight, of_bias


def _map(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
