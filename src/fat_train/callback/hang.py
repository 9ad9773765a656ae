"""End a process that makes no progress, with the stacks of its threads: waiting costs as much as working."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from fat_train.types import EXIT_HUNG

LONG = 3
"""Times the usual patience, where something begins that may compile, build a pipeline, or write a large file."""
TICK_S = 0.5
"""Longest time between two looks of the watching thread."""
REARM_S = 1.0
"""Least time between two settings of the interpreter's own alarm."""
BACKUP_S = 60.0
"""How much later that alarm goes off. It needs no Python to run, so it also ends a process that holds the GIL."""
GRACE_S = 5.0
"""For writing stacks, and again for the other processes of the node to write theirs before the first of them ends all;
they wait longer, so that its status is the job's."""


class HangWatch(Callback):
    """Every rank has its own: where one hangs, the others wait for it in a collective, and all of them end.

    Progress is the end of a training or validation batch. A thread looks at the time since the last one.

    Args:
        patience_s: seconds without progress after which the process ends.
        folder: of the run, for `hang_rank<rank>.txt`.
    """

    def __init__(self, patience_s: float, folder: Path) -> None:
        self.patience_s = patience_s
        self.folder = folder
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._armed_at = -float("inf")
        self._beat = (0.0, 0.0, "")  # when, how long it lasts, what has begun: replaced as one, read by the thread

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch: from here on other ranks may be waited for."""
        self._trainer = trainer
        self._alive("the start", LONG)
        self._stopped.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="hang-watch")
        self._thread.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch waits for the loader, the first step perhaps for the compiler."""
        self._alive("its first training batch", LONG)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Progress."""
        self._alive("a training batch")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A loader and a model that have perhaps not run before."""
        self._alive("validation", LONG)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Progress."""
        self._alive("a validation batch")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Progress."""
        self._alive("an epoch's first batch", LONG)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is done once an epoch."""
        self._alive("the end of an epoch", LONG)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A slow disk is none of this guard's affairs, within bounds."""
        self._alive("a checkpoint", LONG)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Done."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The process is about to end anyway."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Done."""
        self._stop()

    def _alive(self, what: str, times: int = 1) -> None:
        now = time.monotonic()
        patience_s = times * self.patience_s
        longer = patience_s > self._beat[1]
        self._beat = (now, patience_s, what)
        if longer or now - self._armed_at >= REARM_S:
            self._armed_at = now
            assert sys.__stderr__ is not None
            faulthandler.dump_traceback_later(patience_s + BACKUP_S, exit=True, file=sys.__stderr__)

    def _stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._stopped.wait(min(TICK_S, self.patience_s / 10)):
            since, patience_s, what = self._beat
            if time.monotonic() - since > patience_s:
                self._end(patience_s, what)

    def _end(self, patience_s: float, what: str) -> None:
        """Say where this rank stands, and leave without waiting for anybody: no lock, no collective, no clean-up."""
        trainer = self._trainer
        message = (
            f"rank {trainer.global_rank} of {trainer.world_size} made no progress for {patience_s / 60:g} minutes: "
            f"{trainer.global_step} updates done, epoch {trainer.current_epoch + 1}, the last it began was {what} "
            "(callback.guard.hang_minutes)"
        )
        path = self.folder / f"hang_rank{trainer.global_rank}.txt"
        # Each in a thread that may hang in its turn: at a pipe that nobody reads, or at the disk that began it all.
        said = [
            threading.Thread(target=_say, args=(f"Error: {message}. It ends here; its stacks, also in {path}:\n",)),
            threading.Thread(target=_keep, args=(path, f"{message}\n\n")),
        ]
        for thread in said:
            thread.daemon = True
            thread.start()
        for thread in said:
            thread.join(GRACE_S)
        launcher = trainer.strategy.launcher
        starts_others = isinstance(launcher, _SubprocessScriptLauncher) and bool(launcher.procs)
        if trainer.world_size > 1:
            time.sleep(GRACE_S if starts_others or trainer.is_global_zero else 3 * GRACE_S)
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)
        os._exit(EXIT_HUNG)


def _say(message: str) -> None:
    stderr = sys.__stderr__
    assert stderr is not None
    with suppress(OSError):
        os.write(stderr.fileno(), message.encode())
        faulthandler.dump_traceback(file=stderr, all_threads=True)


def _keep(path: Path, message: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(message)
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)
