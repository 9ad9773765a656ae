"""Loggers beside `metrics.csv`, which every run writes: Weights & Biases and TensorBoard."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger


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

    def build(self, folder: Path, name: str, config: dict[str, Any]) -> list[Logger]:
        """The chosen loggers of one run.

        Args:
            folder: the run's; W&B's id is kept there, so that a resumed run goes on in the same plot.
            name: the run's.
            config: plain values of the whole configuration, logged once.
        """
        loggers: list[Logger] = []
        if self.tensorboard:
            loggers.append(TensorBoardLogger(save_dir=folder, name=None, version="tensorboard"))
        if self.wandb:
            loggers.append(
                WandbLogger(
                    save_dir=folder,
                    project=self.wandb_project,
                    entity=self.wandb_entity,
                    name=name,
                    id=_stable_id(folder / "wandb_id.txt"),
                    resume="allow",
                    mode=_wandb_mode(),
                )
            )
        for logger in loggers:
            logger.log_hyperparams(config)
        return loggers


def _stable_id(file: Path) -> str:
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8])
    return file.read_text().strip()


def _wandb_mode() -> str | None:
    """offline where nobody is logged in; None, W&B's own choice, where $WANDB_MODE or a login speaks."""
    import wandb  # noqa: PLC0415  # seconds of import, for those who asked for it

    if os.environ.get("WANDB_MODE") or wandb.login(prompt=False, verify=False):
        return None
    return "offline"
