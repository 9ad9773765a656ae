"""1×1 convolution, as a convolution or as one matrix product over the pixels of all maps."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fat_train.op.choice import way_of
from fat_train.op.layout import is_channels_last


def pointwise_conv(
    x: Float[Tensor, "B C H W"], weight: Float[Tensor, "c C 1 1"], bias: Float[Tensor, " c"] | None
) -> Float[Tensor, "B c H W"]:
    """y[b, :, i, j] = weight · x[b, :, i, j] + bias.

    `gemm` reads a channels-last map as the [B·H·W, C] matrix that it is in memory, and gives one: no copy.
    """
    sizes = (*x.shape, weight.shape[0])
    unmeasured = "gemm" if x.device.type == "cuda" else "torch"  # oneDNN's convolution is twice as fast as its product
    if way_of("pointwise", x, sizes, lambda _: is_channels_last(x), unmeasured) == "torch":
        return plain(x, weight, bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition."""
    return F.conv2d(x, weight, bias)
