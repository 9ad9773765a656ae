"""A training run that takes a tenth of a second, with every seam of a real one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor


class KilledError(Exception):
    """Stands for a process that ends without a word."""


class TinyLoader:
    """Constant batches, and a position inside the epoch that a checkpoint keeps."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self._position = 0

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        first, self._position = self._position, 0
        for number in range(first, self.batches):
            self._position = (number + 1) % self.batches
            yield torch.full((4, 2), 0.3 * (number + 1))

    def state_dict(self) -> dict[str, int]:
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._position = state["position"]


class TinyModule(LightningModule):
    """A linear layer that learns to answer 1; it keeps the loss of every micro-batch it saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 1)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.layer(batch) - 1).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        top1 = 10.0 * self.global_step
        self.log_dict({"val/loss": 1.5, "val/top1": top1, "val/top5": top1 + 1, "val/count": 8.0})

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1 / (1 + update))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class SaveAt(Callback):
    """Saves once, in the named hook, when `update` updates are made."""

    def __init__(self, path: Path, update: int, hook: str) -> None:
        self.path, self.update = path, update
        setattr(self, hook, self._save)

    def _save(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.update and not self.path.exists():
            trainer.save_checkpoint(self.path)


class KillAt(Callback):
    """Ends the process, as it were, after an update."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.global_step == self.update:
            raise KilledError


class TinyRun:
    """`updates_per_epoch` updates of `accumulate` micro-batches with four images each."""

    def __init__(self, *, updates_per_epoch: int = 4, accumulate: int = 2) -> None:
        self.updates_per_epoch = updates_per_epoch
        self.accumulate = accumulate

    @property
    def images_per_update(self) -> int:
        return 4 * self.accumulate

    def fit(
        self,
        *callbacks: Callback,
        epochs: int = 3,
        resume: Path | None = None,
        module: TinyModule | None = None,
        **trainer_arguments: Any,
    ) -> TinyModule:
        """Train; a run that `KillAt` ended returns like any other."""
        module = module or TinyModule()
        train = TinyLoader(self.updates_per_epoch * self.accumulate)
        with contextlib.suppress(KilledError):
            self._trainer(callbacks, max_epochs=epochs, **trainer_arguments).fit(
                module, train, TinyLoader(2), ckpt_path=resume
            )
        return module

    def save_at(self, path: Path, update: int, hook: str) -> Callback:
        """A callback that saves once, in the named hook, when so many updates are made."""
        return SaveAt(path, update, hook)

    def kill_at(self, update: int) -> Callback:
        """A callback that ends the process, as it were, after an update."""
        return KillAt(update)

    def validate(self, *callbacks: Callback) -> None:
        """Validate alone."""
        self._trainer(callbacks, enable_progress_bar=True).validate(TinyModule(), TinyLoader(2), verbose=False)

    def _trainer(self, callbacks: Sequence[Callback], **arguments: Any) -> Trainer:
        return Trainer(
            accelerator="cpu",
            accumulate_grad_batches=self.accumulate,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **({"enable_progress_bar": False} | arguments),
        )


@pytest.fixture
def tiny_run() -> TinyRun:
    return TinyRun()
