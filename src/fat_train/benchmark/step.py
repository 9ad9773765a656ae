"""The split of a training step: its parts, the updates that are timed, and what follows from their times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fat_train.types import Batch, UserError

PARTS = {
    "data": "data wait",
    "copy": "copy to the device",
    "augment": "augmentation",
    "forward": "forward",
    "loss": "loss",
    "backward": "backward",
    "clip": "clipping",
    "optimizer": "optimiser",
    "ema": "EMA",
    "callbacks": "callbacks, logging",
    "rest": "unexplained",
}
"""In the order of an update. `rest` lies between the others: Lightning's loop, DDP's frame of the forward pass."""
TRACED_UPDATES = 3


@dataclass(frozen=True)
class Window:
    """Which updates of a training are timed. Updates count from 0."""

    first: int
    """The first that is timed; those before it warm up."""
    end: int
    """The first after those that are timed."""
    probe: int
    """The one in which the host's reads are looked for, after those that are traced."""
    steps_per_epoch: int

    @classmethod
    def of(cls, *, warmup: int, updates: int, steps_per_epoch: int, log_every_n_steps: int, trace: bool) -> Window:
        """Enough updates that `updates` of them are no epoch's first or last one.

        Raises:
            UserError: an epoch has none.
        """
        if steps_per_epoch < 3:
            raise UserError(
                f"an epoch of {steps_per_epoch} updates has none between its first and its last: give a smaller "
                "trainer.global_batch, or a larger data set"
            )
        window = cls(warmup, 0, 0, steps_per_epoch)
        end = warmup
        while updates:
            updates -= not window.is_turn(end)
            end += 1
        probe = end + TRACED_UPDATES * trace
        while window.is_turn(probe) or ((probe + 1) % log_every_n_steps == 0 and log_every_n_steps > 1):
            probe += 1
        return cls(warmup, end, probe, steps_per_epoch)

    def is_turn(self, update: int) -> bool:
        """Whether the loader begins anew before it, or an epoch's end comes after it: its time is no usual one."""
        return update % self.steps_per_epoch in (0, self.steps_per_epoch - 1)

    @property
    def total(self) -> int:
        """Updates of the whole training."""
        return self.probe + 1

    @property
    def epochs(self) -> int:
        """Epochs that it begins."""
        return -(-self.total // self.steps_per_epoch)


@dataclass
class Row:
    """One update."""

    update: int
    """Counted from 1, as `step` in metrics.csv."""
    host_s: dict[str, float]
    """Seconds of the training's thread, a number a part."""
    device_s: dict[str, float] = field(default_factory=dict)
    """Seconds on a GPU's own time line; empty without one."""
    lead_s: float = 0.0
    """How long after the host the GPU was through with the backward pass."""

    @property
    def total_s(self) -> float:
        """Of the device where there is a time line of its, else of the host."""
        return sum((self.device_s or self.host_s).values())


class Mark(NamedTuple):
    """A moment at which another part begins, in seconds since the first, on the host and on the device."""

    update: int
    part: str
    host_s: float
    device_s: float


def put_on_device(rows: Iterable[Row], marks: Sequence[Mark]) -> None:
    """Fill in the rows' device side. The last mark is an end.

    A part lasts from its own mark to the next one's on the device, idle time included: the device reaches the mark
    after "data wait" when it has both finished all work and been given more, so that part's time is its starvation.
    """
    by_update = {row.update: row for row in rows}
    for this, following in pairwise(marks):
        row = by_update.get(this.update)
        if row is None:
            continue
        row.device_s[this.part] = row.device_s.get(this.part, 0.0) + following.device_s - this.device_s
        if this.part == "backward":
            row.lead_s = following.device_s - following.host_s


@dataclass(frozen=True)
class Split:
    """What was measured."""

    rows: list[Row]
    """The updates that count."""
    images: int
    """Of an update, over all devices."""

    @property
    def on_device(self) -> bool:
        """Whether there is a time line of a GPU."""
        return bool(self.rows[0].device_s)

    @property
    def update_s(self) -> float:
        """Mean seconds of an update."""
        return float(np.mean([row.total_s for row in self.rows]))

    @property
    def images_per_s(self) -> float:
        """Of the whole job."""
        return self.images / self.update_s

    @property
    def images_per_s_unless_waiting(self) -> float:
        """With a loader that is never waited for."""
        return self.images_per_s / max(1 - self.share("data"), 1e-9)

    def median_ms(self, part: str, *, device: bool = False) -> float:
        """Median over the updates."""
        return 1000 * float(np.median([_of(row, device).get(part, 0.0) for row in self.rows]))

    def share(self, *parts: str, device: bool | None = None) -> float:
        """Of the time of all updates, on the device where there is one unless `device` says otherwise."""
        device = self.on_device if device is None else device
        sides = [_of(row, device) for row in self.rows]
        return sum(side.get(part, 0.0) for side in sides for part in parts) / sum(sum(side.values()) for side in sides)

    def occurs(self, part: str) -> bool:
        """Whether there is such a part in this run."""
        return any(part in row.host_s for row in self.rows)

    @property
    def lead_share(self) -> float:
        """Median over the updates of how far the device is behind the host after the backward pass, by the update."""
        return float(np.median([row.lead_s / row.total_s for row in self.rows]))

    def turn_s(self, turns: Sequence[Row]) -> float | None:
        """What an epoch's end and the next one's start cost beyond two usual updates; None where none was seen."""
        both = [
            sum(row.host_s.values()) + sum(following.host_s.values())
            for row, following in pairwise(turns)
            if following.update == row.update + 1
        ]
        usual = float(np.median([sum(row.host_s.values()) for row in self.rows]))
        return float(np.median(both)) - 2 * usual if both else None


def _of(row: Row, device: bool) -> Mapping[str, float]:
    return row.device_s if device else row.host_s


def loader_rate(batches: Iterable[Batch], *, discard: int, seconds: float) -> float | None:
    """Images a second of a loader that nobody lets wait; None where its epoch is over before any could be timed.

    Args:
        batches: one epoch.
        discard: batches before the clock starts: as many as can have been made ahead.
        seconds: to be timed; at least one batch is.
    """
    images, started = 0, None
    for number, batch in enumerate(batches):
        if started is None:
            started = time.perf_counter() if number >= discard else None
            continue
        images += len(batch.targets)
        if time.perf_counter() - started >= seconds:
            break
    return images / (time.perf_counter() - started) if started is not None and images else None
