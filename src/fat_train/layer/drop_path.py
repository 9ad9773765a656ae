"""Drop path (Huang et al., 2016, "Deep Networks with Stochastic Depth"), for each image on its own."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rates_of_blocks(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities p that rise linearly over all blocks, from 0 at the first to `last`: a list a stage."""
    steps = max(1, sum(depths) - 1)
    ends = accumulate(depths)
    return [
        [last * block / steps for block in range(end - depth, end)] for end, depth in zip(ends, depths, strict=True)
    ]


class DropPath(nn.Module):
    """A residual sum whose branch is left out for some images, in training: residual + branch · m / (1 − p).

    m is 1 with probability 1 − p for each image and 0 else. Sum and product are one kernel, to which 1 / (1 − p) is a
    float32: rounded to bfloat16 it would scale every branch by up to 0.4 % too much or too little.

    A compiled graph reads the probability from a buffer, so that one graph serves all blocks of a shape: a Python
    number would be a constant of it. Eager code takes the random numbers that timm's `DropPath` takes, in its order.

    Args:
        drop_prob: p, in [0, 1).
    """

    keep_prob: Tensor | None

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        # None where nothing is dropped: the graph then draws nothing either
        keep_prob = torch.tensor(1 - drop_prob) if drop_prob else None
        self.register_buffer("keep_prob", keep_prob, persistent=False)

    def forward(self, residual: Float[Tensor, "B C H W"], branch: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Their sum, in the type that plain addition gives it."""
        if self.keep_prob is None or not self.training:
            return residual + branch
        shape, dtype = (len(branch), 1, 1, 1), torch.promote_types(residual.dtype, branch.dtype)
        if torch.compiler.is_compiling():
            mask = torch.bernoulli(self.keep_prob.expand(shape)) / self.keep_prob
            return torch.addcmul(residual, branch, mask).to(dtype)
        keep_prob = 1 - self.drop_prob
        mask = residual.new_empty(shape, dtype=dtype).bernoulli_(keep_prob)
        return torch.addcmul(residual, branch, mask, value=1 / keep_prob)

    def extra_repr(self) -> str:
        """p, in what `print(model)` shows."""
        return f"drop_prob={self.drop_prob:.3f}"
