"""How fast a run is now, and what that says about its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from fat_train.callback.epoch_meter import Reading


class _Mark(NamedTuple):
    time: float
    updates: float
    loss_sum: Reading


class Pace:
    """Updates per second and mean loss over the last half minute, and the seconds that a run still takes.

    What lies between the training parts of two epochs (validation, checkpoints) is measured apart, and counts once for
    each epoch that still has to end; before the first one has, the estimate is without it.
    """

    window_s = 30.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: deque[_Mark] = deque()
        self._break_began: float | None = None
        self._breaks_s = 0.0
        self._breaks = 0
        self.updates_per_s: float | None = None
        self.loss: float | None = None

    def begin_break(self) -> None:
        """The training part of an epoch is over; the next mark ends the break."""
        if self._break_began is None:
            self._break_began = self._clock()
            self._marks.clear()

    def mark(self, updates: float, loss_sum: Reading) -> None:
        """Note how far the epoch is.

        Args:
            updates: made in this epoch; a part of one counts as a fraction.
            loss_sum: the sum of their losses, perhaps still on its way.
        """
        now = self._clock()
        if self._break_began is not None:
            self._breaks_s += now - self._break_began
            self._breaks += 1
            self._break_began = None
        self._marks.append(_Mark(now, updates, loss_sum))
        while len(self._marks) > 2 and now - self._marks[1].time > self.window_s:
            self._marks.popleft()
        first, last = self._marks[0], self._marks[-1]
        if last.updates > first.updates and last.time > first.time:
            self.updates_per_s = (last.updates - first.updates) / (last.time - first.time)
        arrived = [mark for mark in self._marks if mark.loss_sum.is_here]
        if arrived and arrived[-1].updates > arrived[0].updates:
            first, last = arrived[0], arrived[-1]
            self.loss = (last.loss_sum.value() - first.loss_sum.value()) / (last.updates - first.updates)

    def remaining_s(self, updates: float, epoch_ends: int) -> float | None:
        """Seconds for so many more updates and ends of epochs; None before a rate is known."""
        if self.updates_per_s is None:
            return None
        break_s = self._breaks_s / self._breaks if self._breaks else 0.0
        return updates / self.updates_per_s + epoch_ends * break_s
