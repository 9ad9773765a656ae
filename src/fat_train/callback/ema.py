"""An exponential moving average of the weights, evaluated beside the raw ones and kept beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchmetrics import Metric

from fat_train.model.compiled import compile_copy, graphs_of
from fat_train.optim.adamw import left_out
from fat_train.types import Batch, UserError


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Average the weights over the updates (Polyak and Juditsky, 1992)."""

    decay: float = 0.0
    """Share of the old average that an update keeps (0.9999 is usual for 300 epochs); 0 keeps no average."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"callback.ema.decay must be in [0, 1); got {self.decay}")


class EMA(Callback):
    """Keeps the average, evaluates it on each validation batch, and saves it under its own key.

    The trained weights are never swapped out, so a checkpoint always resumes from the raw ones, and `val/top1` is
    theirs; the average's is `val/top1_ema`. BatchNorm's statistics are averaged as the weights are.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: ModelEmaV3 | None = None
        self._metric: Metric | None = None
        self._seen_update = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the weights before the model is wrapped; a compiled model lends its copy the graphs."""
        if stage == "fit" and self.average is None:
            self.average = ModelEmaV3(pl_module.model, decay=self.decay)
            compile_copy(self.average.module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the model to its device."""
        assert self.average is not None
        self.average.to(pl_module.device)
        self._metric = self._task(pl_module).new_metric().to(pl_module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where in the run this process begins is known now."""
        self._seen_update = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Average once an update, not once a micro-batch; an update that was left out changes nothing."""
        assert self.average is not None
        if trainer.global_step == self._seen_update:
            return
        self._seen_update = trainer.global_step
        model, skipped = pl_module.model, left_out(trainer.optimizers[0])
        assert isinstance(model, nn.Module)
        if skipped is not None and skipped.device.type != "cpu":
            update_unless(skipped, self.average, model)
        elif skipped is None or not skipped:
            self.average.update(model)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take rank 0's BatchNorm statistics on every rank, as DDP does with the raw model's: on CPUs they differ."""
        if self.average is not None and trainer.world_size > 1:
            for statistic in self.average.module.buffers():
                torch.distributed.broadcast(statistic, src=0)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Let the average classify the batch that the raw weights have just classified."""
        if self.average is None or self._metric is None:
            return
        with trainer.precision_plugin.val_step_context(), graphs_of(self.average.module, batch_idx):
            out = self._task(pl_module).eval_step(batch, model=self.average.module)
        self._metric.update(out.logits, out.targets)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the average's counts beside the raw ones."""
        if self._metric is None:
            return
        values = self._metric.compute()
        pl_module.log_dict({"val/top1_ema": values["top1"], "val/top5_ema": values["top5"]}, logger=False)
        self._metric.reset()

    @staticmethod
    def _task(pl_module: LightningModule) -> Any:
        return pl_module.task  # a `Task`: this layer knows the shape of it, not the class

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the average under a key of its own."""
        assert self.average is not None
        checkpoint["ema"] = {"decay": self.decay, "state_dict": self.average.module.state_dict()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the saved average; where the run had none before, start one at the saved weights."""
        if self.average is None:
            return
        raw = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        self.average.module.load_state_dict(checkpoint.get("ema", {}).get("state_dict", raw))


@torch.no_grad()
def update_unless(skipped: Tensor, average: ModelEmaV3, model: nn.Module) -> None:
    """Update `average` where the scalar `skipped` is 0 and leave it where it is 1, while the host need not know which.

    One of the two terms of each sum is 0, so that the result is the chosen one to the bit.
    """
    values = [value for value in average.module.state_dict().values() if value.is_floating_point()]
    kept = torch._foreach_mul(values, skipped)
    average.update(model)
    torch._foreach_mul_(values, 1 - skipped)
    torch._foreach_add_(values, kept)
