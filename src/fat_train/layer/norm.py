"""Norms with torch's parameters and names, which compute through `fat_train.op`."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from fat_train.op.group_norm import whole_map_norm


class WholeMapNorm(nn.GroupNorm):
    """`GroupNorm(1, C)`: mean and variance over C, H and W of one image together."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The map at mean 0 and variance 1, times the weight, plus the bias of its channel."""
        return whole_map_norm(x, self.weight, self.bias, self.eps)
