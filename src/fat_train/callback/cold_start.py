"""How long torch.compile keeps the first update waiting."""

from __future__ import annotations

import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from fat_train.callback.progress import tell
from fat_train.metric.record import format_duration
from fat_train.model.compiled import is_compiled


class ColdStart(Callback):
    """Tells, once a run, how long the first micro-batch of a compiled model took, forward and backward."""

    def __init__(self) -> None:
        self._started = 0.0
        self._is_over = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        if not self._is_over:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The host waits for the device, this once."""
        if self._is_over:
            return
        self._is_over = True
        if not is_compiled(pl_module.model):  # type: ignore[arg-type]
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._started
        tell(trainer, f"compile        the first batch took {format_duration(seconds)}, with the compiling")
