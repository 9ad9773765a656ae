"""Depth-wise convolution with its bias and, where it is added to its own input, that sum: one pass over the map."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Size, Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from fat_train.op.choice import FUSED_DTYPES, compute_dtype, kernels_of, way_of
from fat_train.op.layout import empty_map, is_channels_last
from fat_train.op.native import depthwise as native


def depthwise_conv(
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "C 1 k k"],
    bias: Float[Tensor, " C"] | None,
    stride: int = 1,
    *,
    residual: bool = False,
) -> Float[Tensor, "B C h w"]:
    """y = DWConv(x), or x + DWConv(x) with `residual`; h = ceil(H / stride), w = ceil(W / stride).

        y[b, c, i, j] = bias[c] + Σ_uv weight[c, 0, u, v] · x[b, c, stride·i + u − k // 2, stride·j + v − k // 2]

    where x is 0 outside its map. k is odd; `residual` goes with stride 1. Inside autocast it computes in autocast's
    type, as any convolution does; our kernels sum in float32 whatever the type, and read channels-last maps.
    """
    assert stride == 1 or not residual
    dtype, kernel_size = compute_dtype(x), weight.shape[-1]

    def can(way: str) -> bool:
        if not is_channels_last(x):
            return False
        return native.handles(dtype, kernel_size, stride) if way == "native" else dtype in FUSED_DTYPES

    sizes = (*x.shape, kernel_size, stride, residual)
    if way_of("depthwise", x, sizes, can, unmeasured="native") == "torch":
        return plain(x, weight, bias, stride, residual)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x.to(dtype), weight, bias, stride, residual)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    """The definition.

    A map of one column is not strided along it, which gives the same: at stride 2 oneDNN's bfloat16 gradient of the
    weight has memory in it that nobody wrote, often not finite.
    """
    strides = (stride, stride if x.shape[3] > 1 else 1)
    y = F.conv2d(x, weight, bias, strides, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    return x + y if residual else y


@custom_op("fat_train::depthwise_conv", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    return kernels_of(x, "depthwise").forward(x, weight, bias, stride, residual)


@custom_op("fat_train::depthwise_conv_input_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _input_grad(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool) -> Tensor:
    return kernels_of(grad, "depthwise").input_grad(grad, weight, height, width, stride, residual)


@custom_op("fat_train::depthwise_conv_weight_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _weight_grad(grad: Tensor, x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    """Float32 whatever the maps' type: the weights' gradient [C, 1, k, k] and the bias's [C]."""
    return kernels_of(grad, "depthwise").weight_grad(grad, x, kernel_size, stride)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, residual: bool) -> Tensor:
    batch, channels, height, width = x.shape
    return empty_map(x, batch, channels, -(-height // stride), -(-width // stride))


@_input_grad.register_fake
def _(grad: Tensor, weight: Tensor, height: int, width: int, stride: int, residual: bool) -> Tensor:
    batch, channels = grad.shape[:2]
    return empty_map(grad, batch, channels, height, width)


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, kernel_size: int, stride: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[1]
    return (
        x.new_empty((channels, 1, kernel_size, kernel_size), dtype=torch.float32),
        x.new_empty(channels, dtype=torch.float32),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, weight, bias, ctx.stride, ctx.residual = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _input_grad(grad, weight, *x.shape[2:], ctx.stride, ctx.residual)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        grad_weight, of_bias = _weight_grad(grad, x, weight.shape[-1], ctx.stride)
        grad_weight = grad_weight.to(weight.dtype)
        if weight.is_contiguous(memory_format=torch.channels_last):
            # the same numbers in the same places, but DistributedDataParallel compares the idle stride of the 1 too
            grad_weight = grad_weight.as_strided(weight.shape, weight.stride())
        grad_bias = of_bias.to(weight.dtype) if ctx.has_bias else None
    return grad_x, grad_weight, grad_bias, None, None


_forward.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.fat_train.depthwise_conv)
def _(x: Size, weight: Size, bias: Size | None, stride: int, residual: bool, *, out_shape: Size, **_: Any) -> int:
    return _flops(out_shape, weight[-1])


@register_flop_formula(torch.ops.fat_train.depthwise_conv_input_grad)
def _(grad: Size, weight: Size, height: int, width: int, stride: int, residual: bool, **_: Any) -> int:
    return _flops(grad, weight[-1])


@register_flop_formula(torch.ops.fat_train.depthwise_conv_weight_grad)
def _(grad: Size, x: Size, kernel_size: int, stride: int, **_: Any) -> int:
    return _flops(grad, kernel_size)


def _flops(output: Size, kernel_size: int) -> int:
    """Two for each output and tap, as torch counts a convolution; but its own count of a convolution's weight gradient
    forgets the groups, and is C times this."""
    return 2 * prod(output) * kernel_size**2
