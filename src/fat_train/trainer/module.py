"""A thin LightningModule: it asks a `Task` for losses and tells Lightning about optimiser, schedule and metrics."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from pytorch_lightning import LightningModule
from timm.scheduler.scheduler import Scheduler
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import SumMetric

from fat_train.model.compiled import graphs_of
from fat_train.optim.adamw import AdamWConfig, clip_gradient, left_out
from fat_train.schedule.cosine import CosineConfig
from fat_train.task.step import StepKey, Task
from fat_train.trainer.plan import RunPlan
from fat_train.trainer.position import Position
from fat_train.types import Batch


class ValidationModule(LightningModule):
    """A task's model, and the counting of validation images: all that evaluating needs.

    Args:
        task: model and loss.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.model = task.model
        self.val_metric = task.new_metric()
        self.val_loss_sum = SumMetric(nan_strategy="disable")  # a NaN has to be seen, not left out

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch."""
        with graphs_of(self.model, batch_idx):
            out = self.task.eval_step(batch)
        self.val_metric.update(out.logits, out.targets)
        self.val_loss_sum.update(out.loss * len(out.targets))

    def on_validation_epoch_end(self) -> None:
        """Sum the counts over the ranks; every rank has the same numbers."""
        values = {f"val/{name}": value.float() for name, value in self.val_metric.compute().items()}
        # for callbacks; loggers get the rows of metrics.csv
        self.log_dict(values | {"val/loss": self.val_loss_sum.compute() / values["val/count"]}, logger=False)
        self.val_metric.reset()
        self.val_loss_sum.reset()


class TrainingModule(ValidationModule):
    """What happens in one update, in order: seed the step, task's loss, (clipped) optimiser step, next rate.

    Args:
        task: model and loss.
        optim: the optimiser's settings.
        schedule: the schedule's settings.
        plan: the run's derived numbers.
        seed: of the run; every step's randomness follows from it and the step's place in the run.
        provenance: plain values that travel in each checkpoint (configuration, versions, data fingerprint).
    """

    def __init__(
        self,
        task: Task,
        optim: AdamWConfig,
        schedule: CosineConfig,
        plan: RunPlan,
        *,
        seed: int,
        provenance: dict[str, Any],
    ) -> None:
        super().__init__(task)
        self.optim_config = optim
        self.schedule_config = schedule
        self.plan = plan
        self.seed = seed
        self.provenance = provenance
        self.gradient_norms: Tensor | None = None  # of each parameter, of the newest update, before clipping
        self._optimizer_settings: list[dict[str, Any]] = []
        self._resumed_at: Position | None = None
        self._references: dict[str, Any] | None = None

    def configure_optimizers(self) -> Any:
        """The optimiser at the scaled rate, and the schedule by update."""
        optimizer = self.optim_config.build(self.model, lr=self.plan.lr)
        self._optimizer_settings = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        scheduler = self.schedule_config.build(
            optimizer,
            total_steps=self.plan.total_steps,
            warmup_steps=self.plan.warmup_steps,
            warmup_lr=self.plan.warmup_lr,
            min_lr=self.plan.min_lr,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Scheduler, metric: Any | None) -> None:  # type: ignore[override]
        """Set the rate of the next update; `global_step` has just been raised to its number."""
        del metric
        scheduler.step_update(num_updates=self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take no schedule from a checkpoint: it follows from the configuration and the number of updates, so that a
        run which is resumed with more epochs gets the longer curve. Lightning's counters follow from the place."""
        checkpoint["lr_schedulers"] = []
        self._resumed_at = Position(*checkpoint["fat_train"]["position"])
        checkpoint["loops"]["fit_loop"] = self._resumed_at.loops(self.plan)

    def on_train_start(self) -> None:
        """Put the configuration's settings over those that came with the optimiser's state, and set the first rate."""
        optimizer, scheduler = self.trainer.optimizers[0], self.trainer.lr_scheduler_configs[0].scheduler
        for group, settings in zip(optimizer.param_groups, self._optimizer_settings, strict=True):
            group.update(settings)
        assert isinstance(scheduler, Scheduler)
        scheduler.step_update(num_updates=self.global_step)
        if self._resumed_at is not None and self._resumed_at.epoch_ended:
            self.trainer.fit_loop.restarting = False  # nothing of the next epoch has been begun
        self._references = super().state_dict()

    def teardown(self, stage: str) -> None:
        """Lightning moves the model away from its device."""
        del stage
        self._references = None

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """While training the tensors are changed in place and never replaced, so one walk over the modules does for all
        checkpoints: it would be most of the time that a save stops the training."""
        if args or kwargs or self._references is None:
            state: dict[str, Any] = super().state_dict(*args, **kwargs)
            return state
        return copy(self._references)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed torch from the step's place in the run, so that no random state has to be saved to resume exactly."""
        del batch
        torch.manual_seed(self.step_key(batch_idx).torch_seed())

    def step_key(self, batch_idx: int) -> StepKey:
        """Where in the run this rank's batch stands."""
        return StepKey(self.seed, self.global_step, batch_idx % self.plan.accumulate, self.global_rank)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one micro-batch; Lightning divides it by the accumulation."""
        out = self.task.train_step(batch, self.step_key(batch_idx))
        return out.loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, once an update. Where a guard has asked to leave bad updates out, one with a gradient that is not
        finite is one; but for float16's loss scaling, which finds its scale by such gradients and leaves them out."""
        del gradient_clip_algorithm
        self.gradient_norms = clip_gradient(optimizer, gradient_clip_val or 0.0)
        bad = left_out(optimizer)
        if bad is not None and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            bad.masked_fill_(~torch.linalg.vector_norm(self.gradient_norms).isfinite(), 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put beside the weights what tells where they came from, and where in the run they stand."""
        place = {"position": list(Position.of(self.trainer, self.plan)), "world_size": self.plan.world_size}
        checkpoint["fat_train"] = self.provenance | place | {"accumulate": self.plan.accumulate}
