"""The callbacks of a run, in the order in which Lightning calls them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pytorch_lightning import Callback

from fat_train.callback.checkpoint import CheckpointConfig
from fat_train.callback.ema import EMA, EMAConfig
from fat_train.callback.finite import StopOnNonFinite
from fat_train.callback.metrics_csv import MetricsCsv
from fat_train.callback.preemption import LeaveRequest, PreemptionConfig
from fat_train.callback.progress import ProgressConfig
from fat_train.checkpoint.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class CallbackConfig:
    """What happens beside the training steps."""

    progress: ProgressConfig = field(default_factory=ProgressConfig)
    """The bar, or the lines of a log file."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Moving average of the weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save, and which checkpoints are kept."""
    preemption: PreemptionConfig = field(default_factory=PreemptionConfig)
    """When to leave before the end."""

    def build(
        self,
        *,
        folder: RunFolder,
        request: LeaveRequest,
        images_per_update: int,
        steps_per_epoch: int,
        epochs: int,
        log_every_n_steps: int,
        val_every_n_epochs: int,
    ) -> list[Callback]:
        """All callbacks of a training run.

        Args:
            folder: the run's.
            request: signals and time limits that end it early.
            images_per_update: the global batch.
            steps_per_epoch: updates an epoch.
            epochs: of the whole run.
            log_every_n_steps: updates between two rows of metrics.csv.
            val_every_n_epochs: epochs between two validations.
        """
        callbacks: list[Callback] = [StopOnNonFinite(folder.last)]
        if self.ema.decay:
            callbacks.append(EMA(self.ema.decay))
        callbacks.append(
            MetricsCsv(folder.metrics, images_per_update=images_per_update, log_every_n_steps=log_every_n_steps)
        )
        bar = self.progress.build(images_per_update=images_per_update, steps_per_epoch=steps_per_epoch, epochs=epochs)
        if bar is not None:
            callbacks.append(bar)
        saver = self.checkpoint.build(
            folder,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            val_every_n_epochs=val_every_n_epochs,
            request=request,
        )
        return [*callbacks, saver]
