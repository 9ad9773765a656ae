"""A real training run in which updates go wrong: `python broken_run.py <kind> <updates> <rank> <words>`.

In processes that Lightning's launcher starts this very script runs again, so that it breaks them too.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor

from fat_train.__main__ import main
from fat_train.task.classification import Classification
from fat_train.task.step import StepKey
from fat_train.types import Batch, Labels, StepOutput

KINDS = ("images", "loss", "gradient")
FACTORS = {"loss": float("inf"), "high": 50.0}
PREPARE, TRAIN_STEP = Classification.prepare, Classification.train_step


def break_updates(kind: str, updates: Collection[int], rank: int = 0) -> None:
    """Spoil the images (and with them all statistics), the loss, or the gradient alone, of these updates on a rank;
    or make the loss high."""

    def prepare(self: Classification, batch: Batch, key: StepKey) -> tuple[Float[Tensor, "B C H W"], Labels]:
        images, labels = PREPARE(self, batch, key)
        is_hit = kind == "images" and key.update in updates and key.rank == rank
        return (images * float("nan") if is_hit else images), labels

    def train_step(self: Classification, batch: Batch, key: StepKey) -> StepOutput:
        out = TRAIN_STEP(self, batch, key)
        if key.update not in updates or key.rank != rank or kind == "images":
            return out
        if kind in FACTORS:
            return StepOutput(out.loss * FACTORS[kind], out.logits, out.targets)
        nothing = torch.sqrt(0 * out.logits.sum())  # 0, with a gradient that is not a number
        return StepOutput(out.loss + nothing, out.logits, out.targets)

    Classification.prepare, Classification.train_step = prepare, train_step


def mend() -> None:
    """As if nothing had been broken."""
    Classification.prepare, Classification.train_step = PREPARE, TRAIN_STEP


if __name__ == "__main__":
    break_updates(sys.argv[1], [int(update) for update in sys.argv[2].split(",")], int(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
