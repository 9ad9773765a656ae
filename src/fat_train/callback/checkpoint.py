"""Which checkpoints a run keeps: the last, the best few, and every so many epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import ModelCheckpoint

from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What to keep beside `last.ckpt`."""

    top_k: int = 1
    """Keep this many checkpoints with the highest val/top1; 0 keeps none."""
    every_n_epochs: int = 0
    """Also keep one every so many epochs for good; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("top_k", "every_n_epochs"):
            if getattr(self, name) < 0:
                raise UserError(f"callback.checkpoint.{name} must not be negative; got {getattr(self, name)}")

    def build(self, folder: Path, val_every_n_epochs: int) -> list[Checkpoints]:
        """One callback a kind. All save at an epoch's end, after validation.

        `last` comes last, so that its record of the best ones is complete when a run resumes from it; a disk that
        fills up before has cost nothing, since no file is replaced but by a whole one.
        """
        kinds = []
        if self.top_k:
            kinds.append(
                Checkpoints(
                    folder,
                    "best-{epoch:03d}-{val/top1:.2f}",
                    every_n_epochs=val_every_n_epochs,
                    monitor="val/top1",
                    top_k=self.top_k,
                )
            )
        if self.every_n_epochs:
            kinds.append(Checkpoints(folder, "epoch-{epoch:03d}", every_n_epochs=self.every_n_epochs, top_k=-1))
        return [*kinds, Checkpoints(folder, "last", every_n_epochs=1)]


class Checkpoints(ModelCheckpoint):
    """Lightning's callback for one kind of checkpoint, told apart from the others by its file name's pattern."""

    def __init__(
        self, folder: Path, pattern: str, *, every_n_epochs: int, monitor: str | None = None, top_k: int = 1
    ) -> None:
        super().__init__(
            dirpath=folder,
            filename=pattern,
            monitor=monitor,
            mode="max",
            save_top_k=top_k,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self._pattern = pattern

    def format_checkpoint_name(self, metrics: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """Lightning's file name, with epochs counted from 1 as on the screen and in the report."""
        return super().format_checkpoint_name({**metrics, "epoch": metrics["epoch"] + 1}, *args, **kwargs)

    @property
    def state_key(self) -> str:
        """Where this kind's record is kept in a checkpoint."""
        return f"Checkpoints[{self._pattern}]"
