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
    bad: Tensor
    arrived: torch.cuda.Event | None


class StopOnNonFinite(Callback):
    """Looks at every loss, of all ranks, without making the host wait for a GPU.

    On the CPU a loss is looked at after its own backward pass, before the update. On a GPU it is copied to pinned
    memory in the background and looked at after the next backward pass, when it has long arrived. Before an epoch
    ends, and so before its checkpoints are written, the last loss, the validation loss and the weights themselves are
    looked at: a checkpoint never holds what this callback would have stopped. All ranks stop together, rank 0 tells.

    Args:
        last_checkpoint: the file that holds the last good weights once the first epoch is over.
    """

    def __init__(self, last_checkpoint: Path) -> None:
        self.last_checkpoint = last_checkpoint
        self._sent: _Pending | None = None
        self._pending: _Pending | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Send this loss on its way, with the word whether any rank's is not finite."""
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        loss = loss.detach()
        bad = (~torch.isfinite(loss)).float()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        arrived = None
        if loss.is_cuda:
            loss, bad = (_to_pinned(value) for value in (loss, bad))
            arrived = torch.cuda.Event()
            arrived.record()
        self._sent = _Pending(trainer.global_step, rate, loss, bad, arrived)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, while there are gradients to tell about: at this loss on the CPU, at the one before on a GPU."""
        assert self._sent is not None
        if self._sent.arrived is None:
            self._look(self._sent, trainer, pl_module)
        elif self._pending is not None:
            self._look(self._pending, trainer, pl_module)
        self._pending, self._sent = self._sent, None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let no checkpoint be written over a fault: this hook runs before those that save."""
        if self._pending is not None:
            self._look(self._pending, trainer, pl_module)
            self._pending = None
        weights = [value for value in pl_module.state_dict().values() if value.is_floating_point()]
        spoilt = not all(torch.isfinite(norm) for norm in torch._foreach_norm(weights))
        val_loss = trainer.callback_metrics.get("val/loss")
        spoilt = spoilt or (val_loss is not None and not torch.isfinite(val_loss))
        if trainer.strategy.reduce_boolean_decision(spoilt, all=False):
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            what = f"weights or validation loss are no longer finite after update {trainer.global_step}"
            self._stop(trainer, pl_module, f"{what} (learning rate {rate:.4g})")

    def _look(self, seen: _Pending, trainer: Trainer, pl_module: LightningModule) -> None:
        if seen.arrived is not None:
            seen.arrived.synchronize()
        if not seen.bad:
            return
        loss = "not finite on another rank" if torch.isfinite(seen.loss) else str(seen.loss.item())
        self._stop(
            trainer, pl_module, f"the loss became {loss} at update {seen.update} (learning rate {seen.rate:.4g})"
        )

    def _stop(self, trainer: Trainer, pl_module: LightningModule, what: str) -> None:
        if not trainer.is_global_zero:
            raise NonFiniteLossError("stopped together with rank 0, which says why")
        model = pl_module.model
        assert isinstance(model, nn.Module)
        norms = "\n".join(f"  {group:<14}{norm:.4g}" for group, norm in gradient_norms(model).items())
        kept = (
            f"The last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint.exists()
            else "No checkpoint was written yet (the first comes with the end of an epoch)"
        )
        raise NonFiniteLossError(
            f"{what}.\nGradient norms by layer group:\n{norms or '  none are held at this point'}\n{kept}. "
            "Usual ways out: a lower optim.base_lr, a longer schedule.warmup_epochs, "
            "trainer.precision=bf16-mixed in place of 16-mixed, a smaller optim.clip_grad_norm."
        )


def _to_pinned(value: Tensor) -> Tensor:
    return torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradients of each top-level part ("patch_embed", "layers.0", …, "head")."""
    squares: dict[str, float] = defaultdict(float)
    for name, parameter in model.named_parameters():
        first, second, *_ = name.split(".")
        group = f"{first}.{second}" if second.isdigit() else first
        if parameter.grad is not None:
            squares[group] += float(parameter.grad.double().square().sum())
    return {group: square**0.5 for group, square in squares.items()}
