"""Say when the loss jumps: a line in the log, and nothing else."""

from __future__ import annotations

import math
from collections import deque
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fat_train.callback.epoch_meter import Reading
from fat_train.callback.progress import tell

SMALLEST_DEVIATION = 0.02
"""Of the mean: a loss that hardly moves has a deviation near 0, and then every movement would be a jump."""


class _Sent(NamedTuple):
    update: int
    rate: float
    loss: Reading


class SpikeWatch(Callback):
    """Compares each update's loss on rank 0 with a running mean and deviation, whenever it has arrived.

    Mean and variance forget exponentially, with the weight 2 / (window + 1) for the newest. A loss beyond the bound
    enters them as the bound itself: one jump moves them little, a lasting one becomes the new level.

    Args:
        sigma: deviations above the mean that make a jump.
        window: updates that mean and deviation look back on; as many pass before the first word.
    """

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma = sigma
        self.window = window
        self.seen = 0
        self.mean = 0.0
        self.variance = 0.0
        self.is_high = False
        self._losses: list[Tensor] = []
        self._rate = 0.0
        self._on_the_way: deque[_Sent] = deque()

    def state_dict(self) -> dict[str, Any]:
        """What the next update is compared with; waits for the losses that are on their way."""
        self._listen(wait=True)
        return {"seen": self.seen, "mean": self.mean, "variance": self.variance, "is_high": self.is_high}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing."""
        self.seen, self.mean = state_dict["seen"], state_dict["mean"]
        self.variance, self.is_high = state_dict["variance"], state_dict["is_high"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where this process begins is known now."""
        self._trainer = trainer
        self._updates = trainer.global_step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The rate that this update uses."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Send the loss on its way after an update, and listen for earlier ones."""
        if not trainer.is_global_zero:
            return
        self._losses.append(outputs["loss"].detach())
        if trainer.global_step > self._updates:
            self._updates = trainer.global_step
            loss = self._losses[0] if len(self._losses) == 1 else torch.stack(self._losses).sum()
            self._on_the_way.append(_Sent(self._updates, self._rate, Reading(loss)))
            self._losses.clear()
        self._listen()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch's line comes after the lines of its updates."""
        self._listen(wait=True)

    def _listen(self, wait: bool = False) -> None:
        while self._on_the_way and (wait or self._on_the_way[0].loss.is_here):
            sent = self._on_the_way.popleft()
            mean = self.mean
            if self.jumps(sent.loss.value()):
                tell(
                    self._trainer,
                    f"update {sent.update}: the loss jumped to {sent.loss.value():.4f} from {mean:.4f}, the mean of "
                    f"about {self.window} updates (learning rate {sent.rate:.3e})",
                )

    def jumps(self, loss: float) -> bool:
        """Take in one more loss; whether it begins a jump. One that is not finite is another guard's affair."""
        if not math.isfinite(loss):
            return False
        if self.seen == 0:
            self.mean = loss
        bound = self.mean + self.sigma * max(math.sqrt(self.variance), SMALLEST_DEVIATION * abs(self.mean))
        was_high, self.is_high = self.is_high, self.seen >= self.window and loss > bound
        step = (min(loss, bound) if self.is_high else loss) - self.mean
        share = max(2 / (self.window + 1), 1 / (self.seen + 1))  # at first the plain mean of all
        self.mean += share * step
        self.variance = (1 - share) * (self.variance + share * step * step)
        self.seen += 1
        return self.is_high and not was_high
