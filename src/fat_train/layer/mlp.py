"""The feed-forward part of a block on maps."""

from __future__ import annotations

from jaxtyping import Float
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d


class ConvMlp(nn.Module):
    """W₂ ⊗ GELU(DWConv(W₁ ⊗ X)), the feed-forward part with a depth-wise convolution on its hidden channels.

    Args:
        width: channels C of the input and the output.
        hidden: channels R between W₁ and W₂.
        kernel_size: side of the DWConv, odd; 0 leaves it out.
    """

    def __init__(self, width: int, hidden: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size:
            self.fc1 = PointwiseConv2d(width, hidden)
            self.mixer: nn.Module = nn.Sequential(DepthwiseConv2d(hidden, kernel_size), nn.GELU())
        else:
            self.fc1 = PointwiseConv2d(width, hidden, activation="gelu")
            self.mixer = nn.Identity()
        self.fc2 = PointwiseConv2d(hidden, width)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The same shape."""
        return self.fc2(self.mixer(self.fc1(x)))


class ConvHead(nn.Sequential):
    """What widens the last map before it is pooled: LN over the channels, 1×1 conv, BN, GELU.

    Args:
        width: channels of the last stage.
        hidden: channels that the classifier reads.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(LayerNorm2d(width), PointwiseConv2d(width, hidden), nn.BatchNorm2d(hidden), nn.GELU())
