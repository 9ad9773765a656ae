"""Which image goes where and when: a pure function of seed, epoch and step, the same for every world size.

The global batch of a step is cut out of the epoch's permutation first, and only then divided among the ranks, so
eight devices see in step s the very images that one device with accumulation sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from fat_train.types import UserError


class BatchPlan(NamedTuple):
    """One micro-batch of one rank."""

    epoch: int
    step: int
    """Optimiser step within the epoch, or, in validation, number of the batch."""
    indices: Int64[np.ndarray, " B"]
    """Rows of the `FileIndex`."""
    rows: Int64[np.ndarray, " B"]
    """Rows of the global step's table of draws that belong to these images."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a split's images for one rank.

    In training epoch e is the permutation of all images seeded by (seed, e); step s takes positions
    [s·G, (s+1)·G), where G = batch_per_device · accumulate · world_size, and the incomplete last step is dropped. In
    validation rank r takes images r, r + world_size, …: each exactly once, the last batch short.

    With R = `repeats` (repeated augmentation: Hoffer et al., 2020; DeiT) position p of a training epoch holds image
    p // R of the permutation, so the epoch is as long as ever, shows the first 1/R of it, and the copies of an image
    follow each other: they share a step, but for an image at a step's edge. So far this is DeiT's sampler, whose rank r
    then takes the positions r, r + world_size, …, which gives each copy to another process. Here the first copies of a
    step's images fill its first rows, the second ones the next, and so on: copies lie a step's R-th part apart, in
    different micro-batches where there are at least R (BatchNorm then sees different images, as in DeiT), and of the
    pairs that mixup makes of a micro-batch no more than R - 1 are two copies of one image.

    Raises:
        UserError: fewer training images than one global batch, or more copies of an image than it holds.
    """

    num_images: int
    batch_per_device: int
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    train: bool = True
    repeats: int = 1

    def __post_init__(self) -> None:
        assert self.batch_per_device > 0
        assert self.accumulate > 0
        assert 0 <= self.rank < self.world_size
        assert self.repeats == 1 or self.train
        if self.train and self.num_images < self.global_batch:
            raise UserError(
                f"trainer.global_batch={self.global_batch} needs at least {self.global_batch} training images; "
                f"the data set has {self.num_images}"
            )
        refuse_scattered_copies(self.repeats, self.global_batch)

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step over all ranks."""
        return self.batch_per_device * self.accumulate * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of a training epoch; in validation the batches of this rank."""
        return self.num_images // self.global_batch if self.train else self.num_batches

    @property
    def num_batches(self) -> int:
        """Micro-batches of this rank in an epoch."""
        if self.train:
            return self.steps_per_epoch * self.accumulate
        own = len(range(self.rank, self.num_images, self.world_size))
        return -(-own // self.batch_per_device)

    def batches(self, epoch: int, first_batch: int = 0) -> Iterator[BatchPlan]:
        """Yield this rank's micro-batches of an epoch, from micro-batch `first_batch` on."""
        assert first_batch >= 0
        return self._train_batches(epoch, first_batch) if self.train else self._eval_batches(epoch, first_batch)

    def _train_batches(self, epoch: int, first_batch: int) -> Iterator[BatchPlan]:
        permutation = np.random.default_rng([self.seed, epoch]).permutation(self.num_images)
        for batch in range(first_batch, self.num_batches):
            step, part = divmod(batch, self.accumulate)
            start = (part * self.world_size + self.rank) * self.batch_per_device
            rows = np.arange(start, start + self.batch_per_device)
            positions = self._positions(step)[rows]
            yield BatchPlan(epoch, step, permutation[positions // self.repeats], rows)

    def _positions(self, step: int) -> Int64[np.ndarray, " G"]:
        """Which positions of the epoch the rows of a step's table take: all first copies, all second ones, …"""
        start = step * self.global_batch
        copies = range(self.repeats)
        positions = np.arange(start, start + self.global_batch)
        return np.concatenate([positions[(copy - start) % self.repeats :: self.repeats] for copy in copies])

    def _eval_batches(self, epoch: int, first_batch: int) -> Iterator[BatchPlan]:
        own = np.arange(self.rank, self.num_images, self.world_size)
        for batch in range(first_batch, self.num_batches):
            indices = own[batch * self.batch_per_device :][: self.batch_per_device]
            yield BatchPlan(epoch, batch, indices, np.arange(len(indices)))


def refuse_scattered_copies(repeats: int, global_batch: int) -> None:
    """The copies of an image belong into one global batch.

    Raises:
        UserError: there are more of them than it holds, or none.
    """
    if not 1 <= repeats <= global_batch:
        raise UserError(
            f"augment.repeats must be at least 1 and at most trainer.global_batch={global_batch}, "
            f"for the copies of an image share an update; got {repeats}"
        )
