"""Stop at the first loss that is not a number, and say what is needed to understand it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from fat_train.types import UserError


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite. The message holds the update, the rate, and gradient norms by layer group."""


class _Pending(NamedTuple):
    update: int
    rate: float
    loss: Tensor
    arrived: torch.cuda.Event | None


class StopOnNonFinite(Callback):
    """Looks at every loss without making the host wait for a GPU.

    A loss is copied to pinned memory in the background and looked at after the next backward pass, when it has long
    arrived; on the CPU it is looked at at once, before its update is made. The checkpoints that the message names are
    written at epochs' ends, after a look at the last loss: they are never younger than the fault.

    Args:
        last_checkpoint: the file that holds the last good weights once the first epoch is over.
    """

    def __init__(self, last_checkpoint: Path) -> None:
        self.last_checkpoint = last_checkpoint
        self._pending: _Pending | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss before this one, then send this one on its way."""
        if self._pending is not None:
            self._look(pl_module)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        loss = loss.detach()
        if loss.is_cuda:
            copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            self._pending = _Pending(trainer.global_step, rate, copy, arrived)
        else:
            self._pending = _Pending(trainer.global_step, rate, loss, None)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On the CPU nothing is in flight: look before the update is made."""
        if self._pending is not None and self._pending.arrived is None:
            self._look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No epoch ends, and no checkpoint is written, over an unseen loss."""
        if self._pending is not None:
            self._look(pl_module)

    def _look(self, pl_module: LightningModule) -> None:
        assert self._pending is not None
        seen, self._pending = self._pending, None
        if seen.arrived is not None:
            seen.arrived.synchronize()
        if torch.isfinite(seen.loss):
            return
        model = pl_module.model
        assert isinstance(model, nn.Module)
        norms = "\n".join(f"  {group:<14}{norm:.4g}" for group, norm in gradient_norms(model).items())
        kept = (
            f"The last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint.exists()
            else "No checkpoint was written yet (the first comes with the end of an epoch)"
        )
        raise NonFiniteLossError(
            f"the loss became {seen.loss.item()} at update {seen.update} (learning rate {seen.rate:.4g}).\n"
            f"Gradient norms by layer group:\n{norms}\n{kept}. "
            "Usual ways out: a lower optim.base_lr, a longer schedule.warmup_epochs, "
            "trainer.precision=bf16-mixed in place of 16-mixed, a smaller optim.clip_grad_norm."
        )


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradients of each top-level part ("patch_embed", "layers.0", …, "head")."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        first, second, *_ = name.split(".")
        group = f"{first}.{second}" if second.isdigit() else first
        if parameter.grad is not None:
            squares[group] += float(parameter.grad.double().square().sum())
    return {group: square**0.5 for group, square in squares.items()}
