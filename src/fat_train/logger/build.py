"""Loggers beside `metrics.csv`, which every run writes: Weights & Biases and TensorBoard."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from fat_train.checkpoint.io import write_atomically
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.logger.background import BackgroundLogger
from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Which services a run also writes to."""

    wandb: bool = False
    """Log to Weights & Biases: online where this machine is logged in, else offline (send with `wandb sync`)."""
    wandb_project: str = "fat_train"
    """Project of the run there."""
    wandb_entity: str | None = None
    """User or team there; null takes the account's own."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run's folder."""
    wait_s: float = 20.0
    """Longest wait of a run's end for a service; and of its start, in the background, for W&B before it is offline."""

    def __post_init__(self) -> None:
        if not self.wait_s > 0:
            raise UserError(f"logger.wait_s must be above 0 seconds; got {self.wait_s}")

    def wandb_id(self, folder: Path, start: Path | None) -> str | None:
        """The run's id on W&B, the same in all its processes; None where it never had one and W&B is not asked for.

        It is kept in the run's folder and, under `fat_train`, in every checkpoint: a checkpoint that was moved to a new
        folder goes on in the same plots. On rank 0 only.

        Args:
            folder: the run's.
            start: the checkpoint that the run goes on from.
        """
        file = folder / "wandb_id.txt"
        known = file.read_text().strip() if file.is_file() else ""
        if not known and start is not None:
            known = read_checkpoint(start).get("fat_train", {}).get("wandb_id") or ""
        if not known and self.wandb:
            known = uuid.uuid4().hex[:8]
        if known:
            write_atomically(file, known)
        return known or None

    def build(self, folder: Path, name: str, config: dict[str, Any], wandb_id: str | None) -> list[Logger]:
        """The chosen loggers of one run.

        Args:
            folder: the run's.
            name: the run's.
            config: plain values of the whole configuration, logged once.
            wandb_id: as `wandb_id` has it.
        """
        metrics = folder / "metrics.csv"
        loggers: list[Logger] = []
        if self.tensorboard:
            from fat_train.logger.event_files import EventFiles  # noqa: PLC0415  # a second of import, as below

            events = EventFiles(folder / "tensorboard", config)
            loggers.append(BackgroundLogger(events, metrics, wait_s=self.wait_s))
        if self.wandb:
            from fat_train.logger.weights_and_biases import WandbService  # noqa: PLC0415

            assert wandb_id is not None
            service = WandbService(
                folder=folder,
                name=name,
                run_id=wandb_id,
                project=self.wandb_project,
                entity=self.wandb_entity,
                config=config,
                wait_s=self.wait_s,
            )
            loggers.append(BackgroundLogger(service, metrics, wait_s=self.wait_s))
        return loggers
