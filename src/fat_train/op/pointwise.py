"""1×1 convolution with the activation behind it: a convolution, or one matrix product over the pixels of all maps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from fat_train.op.choice import compute_dtype, way_of
from fat_train.op.layout import is_channels_last

Shape = tuple[int, ...]
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "relu": F.relu}


def pointwise_conv(
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, "c C 1 1"],
    bias: Float[Tensor, " c"] | None,
    activation: str = "none",
) -> Float[Tensor, "B c H W"]:
    """y[b, :, i, j] = activation(weight · x[b, :, i, j] + bias), activation one of `ACTIVATIONS`.

    `gemm` reads a channels-last map as the [B·H·W, C] matrix that it is in memory, and gives one: no copy. `onednn`
    lets the convolution apply the activation before it writes, where no gradient is wanted: a map less, and on a
    CPU the first touch of a map's memory costs more than its arithmetic.
    """

    def can(way: str) -> bool:
        if way == "onednn":
            wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
            return activation != "none" and not wanted and compute_dtype(x) == torch.float32 and _has_onednn()
        return is_channels_last(x)

    sizes = (*x.shape, weight.shape[0])
    unmeasured = "gemm" if x.device.type == "cuda" else "onednn"  # whose convolution is twice as fast as MKL's product
    way = way_of("pointwise", x, sizes, can, unmeasured)
    if way == "onednn":
        conv = torch.ops.mkldnn._convolution_pointwise
        y: Tensor = conv(x, weight, bias, [0, 0], [1, 1], [1, 1], 1, activation, [], "none")
        return y
    if way == "gemm":
        y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        return ACTIVATIONS[activation](y)
    return plain(x, weight, bias, activation)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The definition."""
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias))


@torch.compiler.assume_constant_result  # torch.compile cannot look into torch's back ends
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


if _has_onednn() and torch.ops.mkldnn._convolution_pointwise not in flop_registry:

    @register_flop_formula(torch.ops.mkldnn._convolution_pointwise)
    def _flops(x_shape: Shape, weight_shape: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        """A multiply-add an output and weight of its channel."""
        del x_shape
        return 2 * math.prod(out_shape) * math.prod(weight_shape[1:])
