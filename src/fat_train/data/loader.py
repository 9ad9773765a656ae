"""What every loader is: an order of images, a table of draws for each step, and a position to resume from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fat_train.augment.draws import Draws, draw
from fat_train.augment.policy import AugmentConfig
from fat_train.data.index import FileIndex
from fat_train.data.order import BatchPlan, Order
from fat_train.types import Batch

DRAWS_TAG = 0x44524157  # keeps the draws' random stream apart from any other that is seeded by (seed, epoch, step)


class Planned(NamedTuple):
    """A batch before its pixels: which images, and, in training, what is done to them."""

    plan: BatchPlan
    draws: Draws | None


class Loader(ABC):
    """An iterable over the batches of one split for one rank, whose position can be saved and restored.

    Iterating runs through the current epoch, from the restored position once and from the start otherwise; a second
    iteration without `set_epoch` runs through the same epoch again. Only the newest iteration may go on.
    """

    def __init__(self, index: FileIndex, order: Order, augment: AugmentConfig | None, image_px: int) -> None:
        assert order.num_images == len(index)
        self.index = index
        self.order = order
        self.augment = augment
        self.image_px = image_px
        self._epoch = 0
        self._batch = 0
        self._start = 0
        self._iteration = 0

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.order.num_batches

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; naming the epoch that a state was restored to keeps the restored position."""
        if epoch != self._epoch:
            self._epoch, self._batch, self._start = epoch, 0, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were handed out (those prefetched do not count)."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration go on after `state["batch"]` batches of epoch `state["epoch"]`."""
        self._epoch = state["epoch"]
        self._batch = self._start = state["batch"]

    def __iter__(self) -> Iterator[Batch]:
        self._iteration += 1
        iteration = self._iteration
        self._batch, self._start = self._start, 0
        for batch in self._load(self._planned(self._epoch, self._batch)):
            self._batch += 1
            yield batch
            if iteration != self._iteration:
                raise RuntimeError("this iteration of the loader ended when a newer one began")

    @abstractmethod
    def _load(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        """Turn plans into batches, in their order; called once an iteration."""

    def _planned(self, epoch: int, first_batch: int) -> Iterator[Planned]:
        table, table_step = None, -1
        for plan in self.order.batches(epoch, first_batch):
            if self.augment is None:
                yield Planned(plan, None)
                continue
            if plan.step != table_step:
                rng = np.random.default_rng([self.order.seed, epoch, plan.step, DRAWS_TAG])
                table = draw(self.augment, self.image_px, rng, self.order.global_batch)
                table_step = plan.step
            assert table is not None
            yield Planned(plan, table.take(plan.rows))

    def _batch_of(self, planned: Planned, images: UInt8[Tensor, "B H W C"]) -> Batch:
        indices = planned.plan.indices
        erase = np.empty((len(indices), 0, 4), np.int64) if planned.draws is None else planned.draws.erase
        targets = self.index.targets[indices]
        return Batch(images, torch.from_numpy(targets), torch.from_numpy(indices), torch.from_numpy(erase))
