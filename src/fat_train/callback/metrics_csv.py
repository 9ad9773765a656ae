"""`metrics.csv` of a run: every number that the report, a sweep or a golden test reads afterwards."""

from __future__ import annotations

import os
import warnings
from collections import deque
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from fat_train.callback.epoch_meter import EpochMeter, Reading, mean_over_ranks
from fat_train.metric.record import COLUMNS, COUNT_COLUMNS, VALIDATION_COLUMNS, Row, format_row, is_epoch_row, read_rows


class CsvFile:
    """Rows on disk, appended at once, so that a killed run keeps all but the row being written.

    A disk that is full does not end the run: the rows wait in memory for the next append, said once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting = ""
        """Rows that the disk has refused."""
        self._warned = False

    def begin(self, last_step: int) -> list[Row]:
        """Keep the rows up to `last_step` of a file that is there, drop later ones, and write the header.

        Written beside the file first and then put in its place: a kill leaves either the old or the new file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(self.path) if self.path.exists() else []
        kept = [row for row in rows if int(row["step"]) <= last_step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(",".join(COLUMNS) + "\n" + "".join(map(format_row, kept)), encoding="utf-8")
        temporary.replace(self.path)
        return kept

    def append(self, row: Row) -> None:
        """Write one row now; on a disk that refuses it, keep it for the next time."""
        self.waiting += format_row(row)
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.waiting)
        except OSError as error:
            os.truncate(self.path, size)
            if not self._warned:
                self._warned = True
                warnings.warn(f"{self.path}: {error.strerror}; its rows wait until there is room again", stacklevel=2)
        else:
            self.waiting = ""


class MetricsCsv(Callback):
    """Writes `metrics.csv`: a row every `log_every_n_steps` updates, and one at each epoch's end.

    Columns: `fat_train.metric.record.COLUMNS`. `lr` is the rate that update number `step` used. A row's `train/loss` is
    the mean over its global batch, an epoch's the mean over its updates, both over all ranks. Numbers are written
    with all their bits. Resuming at update k drops the rows of later updates, so that each stands there once. `val/*`
    come from `trainer.callback_metrics`, as they are when validation ends. The loggers get these very rows.

    Args:
        path: the file; rank 0 writes it.
        images_per_update: images of one update over all ranks (the global batch).
        log_every_n_steps: updates from one row to the next, at least 1.
    """

    def __init__(self, path: Path, *, images_per_update: int, log_every_n_steps: int) -> None:
        self._file = CsvFile(path)
        self._images_per_update = images_per_update
        self._log_every_n_steps = log_every_n_steps
        self._meter = EpochMeter()
        self._lr = 0.0
        self._validation: dict[str, float] = {}
        self._update_losses: list[Tensor] = []
        self._on_the_way: deque[tuple[dict[str, float], Reading]] = deque()
        self._already_there: set[tuple[str, bool]] = set()

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's row needs of the part already done; every row up to here is on the disk then, or part of it.
        A collective, as every rank's loss is in it."""
        self._write_arrived(self._trainer, wait=True)
        return {
            "epoch": self._meter.state_dict(),
            "lr": self._lr,
            "validation": self._validation,
            "waiting": self._file.waiting,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the epoch where the checkpoint left it."""
        self._meter.load_state_dict(state_dict["epoch"])
        self._lr = state_dict["lr"]
        self._validation = state_dict["validation"]
        self._file.waiting = state_dict["waiting"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The update at which this process begins is known: later rows are of a run that was cut off."""
        self._trainer = trainer
        self._seen_updates = self._rate_updates = trainer.global_step
        self._meter.take_up(trainer.current_epoch)
        self._rate_train_s = self._meter.train_s
        if trainer.is_global_zero:
            kept = self._file.begin(last_step=trainer.global_step)
            # a checkpoint of an epoch's last update leads to the rows of that update a second time
            self._already_there = {(row["step"], is_epoch_row(row)) for row in kept}
            for logger in trainer.loggers:
                logger.log_metrics({}, step=trainer.global_step)  # the rows that are there now stand

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new epoch's sums; an epoch taken up in its middle does not pass here."""
        self._meter.reset(trainer.current_epoch)
        self._rate_train_s = 0.0
        self._validation = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The rate that this update uses: at the batch's end the schedule has already set the next one."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss; after an update whose turn it is, send a row on its way."""
        ends_update = trainer.global_step > self._seen_updates
        self._meter.add(outputs["loss"], ends_update)
        update = trainer.global_step if ends_update else trainer.global_step + 1
        if update % self._log_every_n_steps == 0:
            self._update_losses.append(outputs["loss"].detach())
            if ends_update:
                self._send_step_row(trainer)
        self._seen_updates = trainer.global_step
        self._write_arrived(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not the training's time."""
        self._meter.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """This epoch's `val/*`; between validations `callback_metrics` holds on to an earlier epoch's."""
        self._meter.unpause()
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self._validation = {name: metrics[name].item() for name in VALIDATION_COLUMNS if name in metrics}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's own row, with everything."""
        if self._meter.updates == 0:
            return
        train_loss = self._meter.mean_loss(pl_module.device)
        self._write_arrived(trainer, wait=True)
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": self._lr,
            "train/loss": train_loss,
            "images_per_s": self._meter.updates * self._images_per_update / self._meter.train_s,
            "epoch_s": self._meter.elapsed_s,
        }
        self._write(trainer, row | self._validation)

    def _send_step_row(self, trainer: Trainer) -> None:
        loss = mean_over_ranks(torch.stack(self._update_losses).sum())
        self._update_losses.clear()
        train_s = self._meter.train_s
        updates = trainer.global_step - self._rate_updates
        row = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "lr": self._lr,
            "images_per_s": updates * self._images_per_update / (train_s - self._rate_train_s),
        }
        self._rate_updates, self._rate_train_s = trainer.global_step, train_s
        self._on_the_way.append((row, Reading(loss)))

    def _write_arrived(self, trainer: Trainer, wait: bool = False) -> None:
        while self._on_the_way and (wait or self._on_the_way[0][1].is_here):
            row, loss = self._on_the_way.popleft()
            self._write(trainer, row | {"train/loss": loss.value()})

    def _write(self, trainer: Trainer, values: dict[str, float]) -> None:
        row = {name: str(int(v)) if name in COUNT_COLUMNS else repr(float(v)) for name, v in values.items()}
        row = {name: row.get(name, "") for name in COLUMNS}
        if trainer.is_global_zero and (row["step"], is_epoch_row(row)) not in self._already_there:
            self._file.append(row)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=int(values["step"]))
