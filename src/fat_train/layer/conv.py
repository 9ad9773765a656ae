"""Convolutions with torch's parameters, names and defaults, which compute through `fat_train.op`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from fat_train.op.depthwise import depthwise_conv
from fat_train.op.pointwise import pointwise_conv


class DepthwiseConv2d(nn.Conv2d):
    """DWConv, padded so that a side of n pixels becomes ceil(n / stride); with `residual` x + DWConv(x).

    Args:
        channels: of the input and the output.
        kernel_size: side of the kernel, odd.
        stride: 1 or 2.
        residual: add the input to the output, in the same pass over the map; wants stride 1.
        bias: whether there is one.
    """

    def __init__(
        self, channels: int, kernel_size: int, stride: int = 1, *, residual: bool = False, bias: bool = True
    ) -> None:
        padding = kernel_size // 2
        super().__init__(channels, channels, kernel_size, stride, padding, groups=channels, bias=bias)
        assert stride == 1 or not residual
        self.residual = residual

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        """h = ceil(H / stride), w = ceil(W / stride)."""
        return depthwise_conv(x, self.weight, self.bias, self.stride[0], residual=self.residual)

    def extra_repr(self) -> str:
        """torch's, and whether the input is added."""
        return super().extra_repr() + ", residual=True" * self.residual


class PointwiseConv2d(nn.Conv2d):
    """1×1 convolution, W ⊗ X, and the activation of its result.

    Args:
        in_channels: C.
        out_channels: c.
        activation: none, gelu or relu.
        bias: whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, activation: str = "none", *, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B c H W"]:
        """Every pixel by itself."""
        return pointwise_conv(x, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        """torch's, and the activation."""
        return super().extra_repr() + f", activation={self.activation}" * (self.activation != "none")
