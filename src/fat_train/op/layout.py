"""How maps lie in memory: our kernels read and write channels-last ones, pixel after pixel, a pixel's channels side by
side."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether it lies so already."""
    return x.is_contiguous(memory_format=torch.channels_last)


def empty_map(like: Tensor, batch: int, channels: int, height: int, width: int) -> Float[Tensor, "B C H W"]:
    """A map of these sizes, of the type and on the device of `like`; its numbers are still to be written."""
    return torch.empty(
        batch, channels, height, width, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )
