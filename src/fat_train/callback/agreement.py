"""Ranks that do the same thing at the same update, without a device that waits for it."""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum

import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=24)
"""A rank that is late is the watchdog's affair, not this group's."""


class Wish(IntEnum):
    """What a rank would like all ranks to do; of several wishes the largest is agreed on."""

    NOTHING = 0
    SAVE = 1
    LEAVE = 2


class Agreement:
    """The largest wish of all ranks, known to all of them an update later.

    The wishes go round in a group of their own between the hosts (gloo), while the devices work: what is asked for at
    an update's end is the answer to the wishes of the update before, which has long arrived. One process agrees at
    once.
    """

    def __init__(self) -> None:
        self._group: distributed.ProcessGroup | None = None
        self._sent: tuple[Tensor, distributed.Work] | None = None

    def start(self, world_size: int) -> None:
        """Find the other ranks; a collective."""
        if world_size > 1 and self._group is None:
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            assert isinstance(group, distributed.ProcessGroup)  # every rank is a member
            self._group = group

    def exchange(self, wish: Wish) -> Wish:
        """Send this rank's wish on its way; return what the wishes of the last call have come to. A collective."""
        if self._group is None:
            return wish
        agreed = self._receive()
        value = torch.tensor([wish])
        work = distributed.all_reduce(value, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._sent = value, work
        return agreed

    def settle(self, wish: Wish) -> Wish:
        """What all wishes up to this moment have come to. A collective for which the hosts wait."""
        return max(self.exchange(wish), self._receive()) if self._group is not None else wish

    def smallest(self, number: int) -> int:
        """The smallest number of any rank. A collective for which the hosts wait."""
        if self._group is None:
            return number
        value = torch.tensor([number])
        distributed.all_reduce(value, distributed.ReduceOp.MIN, group=self._group)
        return int(value)

    def _receive(self) -> Wish:
        if self._sent is None:
            return Wish.NOTHING
        (value, work), self._sent = self._sent, None
        work.wait()
        return Wish(int(value))
