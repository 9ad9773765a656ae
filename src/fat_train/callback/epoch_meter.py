"""What an epoch of training has cost so far: mean loss, updates and seconds, kept without stopping the device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes that train together; 1 without `torch.distributed`."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them."""
    return distributed.get_rank() if world_size() > 1 else 0


def mean_over_ranks(value: Float[Tensor, "*_"]) -> Float[Tensor, "*_"]:
    """Mean over the ranks. A collective: every rank must call it; on CUDA the host does not wait for it."""
    if world_size() == 1:
        return value
    total = value.clone()
    distributed.all_reduce(total)
    return total / world_size()


class Reading:
    """Numbers on their way from the device: the copy is queued at once, and they are asked for when they have arrived.

    On CUDA the copy goes to pinned memory behind the work already queued, so that nothing waits for it; elsewhere it
    is there immediately.
    """

    def __init__(self, numbers: Float[Tensor, "*_"]) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._host.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))
        else:
            self._host = numbers.detach().to("cpu", copy=True)

    @property
    def is_here(self) -> bool:
        """Whether asking would not wait."""
        return self._event is None or self._event.query()

    def value(self) -> float:
        """The one number; waits for the device if it is not here yet."""
        (number,) = self.values()
        return number

    def values(self) -> list[float]:
        """All numbers, in a row; waits for the device if they are not here yet."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.flatten().tolist()


class EpochMeter:
    """Mean training loss and seconds of the epoch at hand.

    The loss is summed on the device in float64, by a few small kernels a batch; the host reads it only when asked. A
    loss that is not finite is left out of the mean, as a guard leaves out its update. Time spent in validation counts
    for `elapsed_s` and not for `train_s`. The state goes into checkpoints, so that an epoch interrupted in its middle
    reports the mean over all its updates, to the bit.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.reset(epoch=0)

    def reset(self, epoch: int) -> None:
        """Begin an epoch: nothing seen, no time spent, the clock running."""
        self.epoch = epoch
        self.updates = 0
        self._batches = 0
        self._sums: Tensor | None = None  # of the losses, and of the batches that are not in it
        self._restored_sums: list[list[float]] = []
        self._elapsed_before_s = 0.0
        self._paused_s = 0.0
        self._paused_since: float | None = None
        self._since = self._clock()

    def take_up(self, epoch: int) -> None:
        """Begin in this process: go on with a restored `epoch`, without the time between the two processes."""
        if self.epoch == epoch:
            self._since = self._clock()
        else:
            self.reset(epoch)

    def add(self, loss_share: Float[Tensor, ""], ends_update: bool) -> None:
        """Count one micro-batch.

        Args:
            loss_share: its part of its update's mean loss on this rank, i.e. already divided by the number of
                micro-batches an update has, as Lightning's `outputs["loss"]` is.
            ends_update: whether the optimiser has stepped after it.
        """
        share = loss_share.detach()
        finite = share.isfinite()
        self._sums_on(share.device).add_(torch.stack([torch.where(finite, share, 0.0), (~finite).to(share.dtype)]))
        self._batches += 1
        self.updates += ends_update

    def pause(self) -> None:
        """Validation begins: time no longer counts for the training's rate."""
        self._paused_since = self._clock()

    def unpause(self) -> None:
        """Validation is over."""
        if self._paused_since is not None:
            self._paused_s += self._clock() - self._paused_since
            self._paused_since = None

    @property
    def elapsed_s(self) -> float:
        """Seconds since the epoch began, validation included."""
        return self._elapsed_before_s + self._clock() - self._since

    @property
    def train_s(self) -> float:
        """Seconds since the epoch began, without validation."""
        now_paused_s = self._clock() - self._paused_since if self._paused_since is not None else 0.0
        return self.elapsed_s - self._paused_s - now_paused_s

    def loss_sum(self, device: torch.device) -> Float[Tensor, ""]:
        """Sum over the updates of this rank's mean losses: a copy, on the device."""
        return self._sums_on(device)[0].clone()

    def mean_loss(self, device: torch.device) -> float:
        """Mean over the updates and ranks. A collective that also waits for the device: once an epoch."""
        total, lost = mean_over_ranks(self._sums_on(device)).tolist()
        counted = self.updates - lost * self.updates / self._batches
        return total / counted if counted else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers for a checkpoint. A collective: the sum of every rank is in it."""
        sums = self._restored_sums
        if self._sums is not None:
            gathered = [torch.empty_like(self._sums) for _ in range(world_size())]
            if world_size() > 1:
                distributed.all_gather(gathered, self._sums)
            else:
                gathered = [self._sums]
            sums = torch.stack(gathered).tolist()
        return {
            "epoch": self.epoch,
            "updates": self.updates,
            "batches": self._batches,
            "loss_sum_of_ranks": [loss for loss, _ in sums],
            "lost_batches_of_ranks": [lost for _, lost in sums],
            "elapsed_s": self.elapsed_s,
            "paused_s": self._paused_s,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up an epoch where `state_dict` left it; on another number of ranks each takes the mean sum."""
        self.reset(state["epoch"])
        self.updates = state["updates"]
        sums = state["loss_sum_of_ranks"]
        lost = state.get("lost_batches_of_ranks", [0.0] * len(sums))  # checkpoints of before the guard lack it
        self._batches = state.get("batches", self.updates)
        self._restored_sums = [list(pair) for pair in zip(sums, lost, strict=True)]
        self._elapsed_before_s = state["elapsed_s"]
        self._paused_s = state["paused_s"]

    def _sums_on(self, device: torch.device) -> Float[Tensor, " 2"]:
        if self._sums is None:
            restored = self._restored_sums or [[0.0, 0.0]]
            same_world = len(restored) == world_size()
            mean = [sum(numbers) / len(restored) for numbers in zip(*restored, strict=True)]
            dtype = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
            start = restored[rank()] if same_world else mean
            # kernels, where a copy from the host would wait
            self._sums = torch.stack([torch.full((), number, dtype=dtype, device=device) for number in start])
        return self._sums
