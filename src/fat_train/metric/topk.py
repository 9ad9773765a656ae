"""Top-1 and top-5 as integer counts, so that the result is the same for any number of ranks and any batch size."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class TopK(Metric):
    """Counts of pictures seen, and of those whose class is among the 1 and the 5 highest logits.

    States are int64 and summed over the ranks: nothing is averaged before the last division.
    """

    full_state_update = False
    top1: Tensor
    top5: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("top1", "top5", "count"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Float[Tensor, "B K"], targets: Int[Tensor, " B"]) -> None:
        """Add one batch. Where there are fewer than five classes, top-5 counts all of them."""
        guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
        hits = guesses == targets[:, None]
        self.top1 += hits[:, :1].sum()
        self.top5 += hits.sum()
        self.count += targets.numel()

    def compute(self) -> dict[str, Tensor]:
        """`top1` and `top5` in percent, `count` in pictures."""
        return {
            "top1": 100 * self.top1.double() / self.count,
            "top5": 100 * self.top5.double() / self.count,
            "count": self.count,
        }
