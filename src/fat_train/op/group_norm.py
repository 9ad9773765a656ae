"""GroupNorm with one group: mean and variance over a whole map, C, H and W together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.library import custom_op

from fat_train.op.choice import FUSED_DTYPES, compute_dtype, kernels_of, way_of
from fat_train.op.layout import is_channels_last


def whole_map_norm(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float
) -> Float[Tensor, "B C H W"]:
    """y = (x − mean) / √(variance + eps) · weight + bias, moments over C, H, W of each image.

    The definition gives float32 inside autocast. The kernel computes in float32 too, but gives autocast's type,
    which is what the convolutions that read it would round it to.
    """
    dtype = compute_dtype(x)

    def can(_: str) -> bool:
        return is_channels_last(x) and dtype in FUSED_DTYPES

    if way_of("norm", x, tuple(x.shape), can, unmeasured="torch") == "torch":
        return plain(x, weight, bias, eps)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x.to(dtype), weight, bias, eps)[0]


def plain(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The definition."""
    return F.group_norm(x, 1, weight, bias, eps)


@custom_op("fat_train::whole_map_norm", mutates_args=(), device_types=("cpu", "cuda"))
def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised map; mean and reciprocal deviation of each image, float32 [B]."""
    return kernels_of(x, "group_norm").forward(x, weight, bias, eps)


@custom_op("fat_train::whole_map_norm_grad", mutates_args=(), device_types=("cpu", "cuda"))
def _grad(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of x in its type; of weight and bias in float32 [C]."""
    return kernels_of(x, "group_norm").grad(grad, x, weight, mean, rstd)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    moment = x.new_empty(len(x), dtype=torch.float32)
    return torch.empty_like(x), moment, torch.empty_like(moment)


@_grad.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_weight = x.new_empty(x.shape[1], dtype=torch.float32)
    return torch.empty_like(x), of_weight, torch.empty_like(of_weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    x, weight, mean, rstd = ctx.saved_tensors
    of_x, of_weight, of_bias = _grad(grad, x, weight, mean, rstd)
    return of_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None


_forward.register_autograd(_backward, setup_context=_save)
