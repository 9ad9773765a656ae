"""What saving costs a training: how long it stands still for a checkpoint, and how much slower it is meanwhile.

One training is timed in blocks of equally many updates. Every other block begins with a checkpoint, so that a machine
whose speed drifts hurts both kinds alike.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fat_train.callback.checkpoint import Checkpoints
from fat_train.checkpoint.io import tensors_of
from fat_train.checkpoint.writer import BackgroundCheckpointIO


@dataclass
class Seconds:
    """What was measured, in seconds, one number a save, a block or a try."""

    handing_over: list[float] = field(default_factory=list)
    """The training's thread, at a save, until it goes on."""
    waiting: list[float] = field(default_factory=list)
    """The training's thread, before the next optimiser step, until weights and moments are copied."""
    background: list[float] = field(default_factory=list)
    """Copying and writing, in the background, until the file has its name."""
    with_save: list[float] = field(default_factory=list)
    """Blocks of updates that begin with a save."""
    without_save: list[float] = field(default_factory=list)
    """Blocks of updates between them."""
    copy_weights: list[float] = field(default_factory=list)
    """Copying the weights alone, between two updates."""
    copy_all: list[float] = field(default_factory=list)
    """Copying weights and moments, between two updates."""

    @property
    def pause(self) -> float:
        """Median time that a save stops the training."""
        return float(np.median(self.handing_over)) + (float(np.median(self.waiting)) if self.waiting else 0.0)

    @property
    def cost(self) -> float:
        """How much longer a block is for its save than the one before it, as a share: the median over all pairs."""
        return float(np.median(np.array(self.with_save) / np.array(self.without_save))) - 1


class TimedIO(BackgroundCheckpointIO):
    """The writer, with a clock in its thread."""

    def __init__(self, seconds: Seconds) -> None:
        super().__init__()
        self._seconds = seconds

    def _write(self, *words: Any) -> None:
        started = time.perf_counter()
        super()._write(*words)
        self._seconds.background.append(time.perf_counter() - started)


class TimedCheckpoints(Checkpoints):
    """The callback of every run, with clocks around all that stops the training."""

    seconds: Seconds

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The wait for the copy, if one is being made."""
        if self._io(trainer).is_writing or self._has_saved:
            started = time.perf_counter()
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self._has_saved:
                self.seconds.waiting.append(time.perf_counter() - started)
            self._has_saved = False

    def _save(self, *words: Any) -> None:
        _finish_device_work()
        started = time.perf_counter()
        super()._save(*words)
        self.seconds.handing_over.append(time.perf_counter() - started)
        self._has_saved = True

    _has_saved = False


class BlockClock(Callback):
    """Times blocks of `every` updates; those that begin with a save are told apart from the others.

    Args:
        seconds: where to.
        every: updates of a block; saves are to come every second block.
    """

    def __init__(self, seconds: Seconds, every: int) -> None:
        self._seconds = seconds
        self._every = every
        self._marked_at: float | None = None
        self._seen_updates = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A block ends before the save that follows this update, if one does."""
        blocks, rest = divmod(trainer.global_step, self._every)
        if trainer.global_step == self._seen_updates:
            return
        self._seen_updates = trainer.global_step
        if blocks % 2 == 1 and rest == self._every // 2 and self._marked_at is not None:
            self._marked_at += self._copy(trainer, pl_module)
        if rest:
            return
        _finish_device_work()
        now = time.perf_counter()
        if self._marked_at is not None:  # the first block warms up
            into = self._seconds.without_save if blocks % 2 == 0 else self._seconds.with_save
            into.append(now - self._marked_at)
        self._marked_at = now

    def _copy(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Time plain copies of what is saved, where a checkpoint could be due; returns how long that took."""
        started = time.perf_counter()
        weights = list(pl_module.state_dict().values())
        moments = [tensor for optimizer in trainer.optimizers for tensor in tensors_of(dict(optimizer.state))]
        self._seconds.copy_all.append(_time_of_copying(weights + moments))
        self._seconds.copy_weights.append(_time_of_copying(weights))
        return time.perf_counter() - started


def lines_of(seconds: Seconds, every: int, size_mb: float) -> list[str]:
    """What was found, in sentences.

    Args:
        seconds: of a training whose every second block began with a save.
        every: updates of a block.
        size_mb: of one checkpoint.
    """
    handing, waiting = (1000 * float(np.median(values or [0.0])) for values in (seconds.handing_over, seconds.waiting))
    weights, everything = (1000 * float(np.median(values)) for values in (seconds.copy_weights, seconds.copy_all))
    block = float(np.median(seconds.without_save))
    pairs = np.quantile(np.array(seconds.with_save) / np.array(seconds.without_save) - 1, [0.25, 0.75])
    return [
        f"pause          {1000 * seconds.pause:.1f} ms a save: {handing:.1f} to hand over, {waiting:.1f} of waiting "
        f"before the next optimiser step ({seconds.pause / (block / every):.1%} of an update)",
        f"copying        the weights takes {weights:.1f} ms, all that is saved {everything:.1f} ms: the pause is "
        f"{1000 * seconds.pause / weights:.2f} and {1000 * seconds.pause / everything:.2f} of that",
        f"background     {1000 * float(np.median(seconds.background)):.0f} ms until {size_mb:.1f} MB are on the disk",
        f"cost           {seconds.cost:+.1%} of the time of {every} updates for a checkpoint every {every} "
        f"(median of {len(seconds.with_save)} pairs of blocks without and with one, in turns; half of them lie between "
        f"{pairs[0]:+.1%} and {pairs[1]:+.1%})",
    ]


def _time_of_copying(tensors: list[Tensor]) -> float:
    _finish_device_work()
    started = time.perf_counter()
    copies = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    elapsed = time.perf_counter() - started
    del copies
    return elapsed


def _finish_device_work() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
