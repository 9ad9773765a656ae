"""Which checkpoints a run keeps, when it saves, and how it leaves before its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch.optim import Optimizer

from fat_train.callback.agreement import Agreement, Wish
from fat_train.callback.ema import EMA
from fat_train.callback.preemption import LeaveRequest
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.checkpoint.writer import BackgroundCheckpointIO, WriteOrder
from fat_train.types import UnfinishedRunError, UserError

MONITOR = "val/top1"
RETRY_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep beside `last.ckpt` and the one before it."""

    top_k: int = 1
    """Keep this many checkpoints with the highest val/top1; 0 keeps none."""
    every_n_epochs: int = 0
    """Also keep one every so many epochs for good; 0 keeps none."""
    every_n_minutes: float = 10.0
    """Save last.ckpt this often within an epoch; it is saved at each epoch's end in any case. 0: only there."""
    every_n_steps: int = 0
    """Save last.ckpt every so many updates of the run; 0: by the clock alone."""

    def __post_init__(self) -> None:
        for name in ("top_k", "every_n_epochs", "every_n_minutes", "every_n_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"callback.checkpoint.{name} must not be negative; got {getattr(self, name)}")

    def build(
        self, folder: RunFolder, *, steps_per_epoch: int, epochs: int, val_every_n_epochs: int, request: LeaveRequest
    ) -> Checkpoints:
        """The callback of a run.

        Args:
            folder: the run's.
            steps_per_epoch: updates an epoch.
            epochs: of the whole run.
            val_every_n_epochs: epochs between two validations.
            request: signals and time limits.
        """
        return Checkpoints(
            self,
            folder,
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            val_every_n_epochs=val_every_n_epochs,
            request=request,
        )


class _Kept(NamedTuple):
    """One of the best checkpoints."""

    value: float
    name: str


class Checkpoints(Checkpoint):
    """Saves, and leaves when it is asked to.

    All ranks save and leave at the same update (`Agreement`); what is written, and how, is `BackgroundCheckpointIO`'s.
    At an epoch's end the file that becomes last.ckpt also gets its place among the best and its epoch's name: one file
    is written, whatever its names. The list of the best is part of it; where the folder does not hold what the list
    says, the folder is right.

    A checkpoint that cannot be written (a full disk) is said, tried again a minute later, and costs nothing but itself;
    the run fails only if its very last one cannot be.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: RunFolder,
        *,
        steps_per_epoch: int,
        epochs: int,
        val_every_n_epochs: int,
        request: LeaveRequest,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._folder = folder
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._val_every_n_epochs = val_every_n_epochs
        self._request = request
        self._clock = clock
        self._agreement = Agreement()
        self._best: list[_Kept] = []
        self._former_best: list[_Kept] = []
        self._dropped: list[str] = []
        self._seen_updates = 0
        self._save_at = float("inf")
        self._has_wished = False
        self._shared_val_batches = 0
        self._buffers: frozenset[str] | None = None

    @property
    def state_key(self) -> str:
        """Where the list of the best is kept in a checkpoint."""
        return "Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """The best ones, and the files that have just lost their place: a kill may come before they are deleted."""
        return {"best": [list(kept) for kept in self._best], "dropped": self._dropped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the list."""
        self._best = [_Kept(*kept) for kept in state_dict["best"]]
        self._dropped = state_dict["dropped"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the other ranks."""
        self._agreement.start(trainer.world_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mend the list by what the folder holds; leave at once if that was asked for on the way here."""
        self._request.listen_while_training()
        self._seen_updates = trainer.global_step
        self._save_at = self._next_time()
        self._buffers = _buffers(trainer)
        if trainer.is_global_zero:
            self._mend(trainer)
        if self._agreement.settle(self._wish(trainer)) == Wish.LEAVE:
            self._leave(trainer, has_saved=False)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The weights are about to change."""
        self._io(trainer).wait_for_copy()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Within an epoch: save where it is time to, and leave where that is agreed on."""
        if trainer.global_step == self._seen_updates:
            return
        self._seen_updates = trainer.global_step
        self._tell_failure(trainer)
        if trainer.global_step % self._steps_per_epoch == 0:
            return  # the epoch's end saves, after validation
        agreed = self._agreement.exchange(self._wish(trainer))
        every = self._config.every_n_steps
        if agreed or (every and trainer.global_step % every == 0):
            self._save(trainer)
        if agreed == Wish.LEAVE:
            self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ranks may differ by a batch: they can agree during as many as all of them have."""
        self._shared_val_batches = self._agreement.smallest(int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A long validation is not waited for: the run then begins it again when it goes on."""
        if batch_idx >= self._shared_val_batches:
            return
        if self._agreement.exchange(Wish.LEAVE if self._request.why else Wish.NOTHING) == Wish.LEAVE:
            self._save(trainer)
            self._leave(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, under all names that this epoch has earned."""
        self._io(trainer).flush()
        self._tell_failure(trainer)
        epoch = trainer.current_epoch + 1
        also_as = [f"epoch-{epoch:03d}.ckpt"] if _is_turn(epoch, self._config.every_n_epochs) else []
        former = self._best
        if self._config.top_k and _is_turn(epoch, self._val_every_n_epochs):
            also_as += self._rank(epoch, trainer.callback_metrics[MONITOR].item())
        self._save(trainer, also_as)
        self._former_best = former
        if self._agreement.settle(self._wish(trainer)) == Wish.LEAVE and epoch < self._epochs:
            self._leave(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last checkpoint has to be there.

        Raises:
            UserError: it cannot be written.
        """
        self._io(trainer).flush()
        if self._agreement.settle(Wish.SAVE if self._tell_failure(trainer) else Wish.NOTHING):
            self._save(trainer)
            self._io(trainer).flush()
            failure = self._io(trainer).take_failure()
            if failure is not None:
                raise UserError(
                    f"training is over, but its last checkpoint could not be saved: {failure[0]}: "
                    f"{failure[1]}. Free some space; the same command then goes on from {self._saved_before()}"
                )

    def _io(self, trainer: Trainer) -> BackgroundCheckpointIO:
        io = trainer.strategy.checkpoint_io
        assert isinstance(io, BackgroundCheckpointIO)
        return io

    def _wish(self, trainer: Trainer) -> Wish:
        """What this rank would like; rank 0's clock says when to save."""
        if self._request.why:
            return Wish.LEAVE
        if trainer.is_global_zero and not self._has_wished and self._clock() >= self._save_at:
            self._has_wished = True
            return Wish.SAVE
        return Wish.NOTHING

    def _save(self, trainer: Trainer, also_as: Sequence[str] = ()) -> None:
        """Begin to write. A collective: sums of every rank are part of a checkpoint."""
        self._has_wished, self._save_at = False, self._next_time()
        self._former_best = self._best
        order = WriteOrder(
            also_as=tuple(self._folder.checkpoints / name for name in also_as),
            after=(self._folder.metrics,),
            keep_former_as=self._folder.previous,
            then_delete=tuple(self._folder.checkpoints / name for name in self._dropped),
            buffers=self._buffers,
            device=trainer.strategy.root_device,
        )
        trainer.save_checkpoint(self._folder.last, storage_options=order)
        self._dropped = []

    def _leave(self, trainer: Trainer, *, has_saved: bool = True) -> NoReturn:
        self._io(trainer).flush()
        failed = self._tell_failure(trainer)
        why = self._request.why or "another process was asked to leave"
        kept = f"saved as {self._folder.last}" if has_saved and not failed else f"kept {self._saved_before()}"
        _say(trainer, f"leaving        {why}: at update {trainer.global_step}, {kept}; the same command goes on")
        # Now, and not when all is closed: Slurm gives a job whose time is over few seconds, and loggers may want them.
        if trainer.is_global_zero and (said := self._request.requeue()):
            _say(trainer, said)
        raise UnfinishedRunError(why, self._request.status if trainer.is_global_zero else 0)

    def _rank(self, epoch: int, value: float) -> list[str]:
        """Put an epoch into the list if it belongs there; returns the names that its checkpoint gets."""
        name = f"best-{epoch:03d}-{value:.2f}.ckpt"
        # of equal ones the earlier stays before the later
        ranked = sorted([*self._best, _Kept(value, name)], key=lambda kept: -kept.value)
        self._best, out = ranked[: self._config.top_k], ranked[self._config.top_k :]
        self._dropped = [kept.name for kept in out if kept.name != name]
        return [name] if _Kept(value, name) in self._best else []

    def _mend(self, trainer: Trainer) -> None:
        delete_dropped(self._folder, self.state_dict())
        self._dropped = []
        there = [kept for kept in self._best if (self._folder.checkpoints / kept.name).is_file()]
        for kept in self._best:
            if kept not in there:
                _say(
                    trainer,
                    f"warning        {kept.name} is gone from {self._folder.checkpoints}: the next best is kept",
                )
        self._best = there

    def _tell_failure(self, trainer: Trainer) -> bool:
        """Say that a checkpoint could not be written, and try again in a minute; returns whether one could not."""
        failure = self._io(trainer).take_failure()
        if failure is None:
            return False
        path, why = failure
        self._best, self._dropped = self._former_best, []
        self._save_at = self._clock() + RETRY_AFTER_S
        _say(
            trainer,
            f"warning        could not save {path}: {why}. The run goes on with {self._saved_before()}, "
            f"and tries again in {RETRY_AFTER_S:.0f} s",
        )
        return True

    def _saved_before(self) -> str:
        return str(self._folder.last) if self._folder.last.exists() else "no checkpoint yet"

    def _next_time(self) -> float:
        minutes = self._config.every_n_minutes
        return self._clock() + minutes * 60 if minutes else float("inf")


def delete_dropped(folder: RunFolder, state: Mapping[str, Any]) -> None:
    """Delete the files of which a checkpoint says that they had just lost their place among the best.

    Args:
        folder: the run's.
        state: what `Checkpoints.state_dict` gave.
    """
    for name in state["dropped"]:
        (folder.checkpoints / name).unlink(missing_ok=True)


def _is_turn(epoch: int, every: int) -> bool:
    return every > 0 and epoch % every == 0


def _buffers(trainer: Trainer) -> frozenset[str]:
    """Names of what changes between two optimiser steps, in the model and in its average."""
    averages = (callback.average for callback in _callbacks(trainer) if isinstance(callback, EMA))
    modules = [trainer.lightning_module, *(average.module for average in averages if average is not None)]
    return frozenset(name for module in modules for name, _ in module.named_buffers())


def _callbacks(trainer: Trainer) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def _say(trainer: Trainer, text: str) -> None:
    if trainer.is_global_zero:
        trainer.print(text)
