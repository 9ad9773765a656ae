"""Why a run leaves before its end: a signal, or a time that is over. Nothing here saves or stops anything."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from fat_train.cluster.slurm import this_job
from fat_train.types import EXIT_UNFINISHED, UserError

PREEMPTING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_INTERRUPTED = 130
AFTER_CTRL_C = b"\nCtrl-C: saving at the end of this update; once more ends at once\n"


@dataclass(frozen=True, kw_only=True)
class PreemptionConfig:
    """When a run saves and leaves before its end, and whether its job is put into the queue again."""

    margin_s: float = 120.0
    """Leave so many seconds before the job's time limit, as SLURM tells it, or before `max_hours`, at most half of what
    is left at the start; slow updates or a slow disk need more."""
    max_hours: float = 0.0
    """Leave when the process has run this long; 0 knows no such limit."""
    requeue: bool = True
    """Under SLURM: put the job (or the array's task) into the queue again, unless it was cancelled."""

    def __post_init__(self) -> None:
        for name in ("margin_s", "max_hours"):
            if getattr(self, name) < 0:
                raise UserError(f"callback.preemption.{name} must not be negative; got {getattr(self, name)}")


class LeaveRequest:
    """Signals and clocks, turned into a word that the training loop asks for between two updates.

    SIGTERM, SIGUSR1 and SIGUSR2 only set a flag here: a handler that saves would run in the middle of anything, another
    save included. So does the first Ctrl-C once the training runs; the second one ends the process at once.
    """

    def __init__(
        self, config: PreemptionConfig, *, speaks: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.config = config
        self._speaks = speaks
        self._clock = clock
        self._signal: signal.Signals | None = None
        self._former: dict[signal.Signals, Any] = {}
        self._ends: list[tuple[float, str]] = []

    def __enter__(self) -> LeaveRequest:
        job = this_job()
        if job is not None and job.end_time is not None:
            self._leave_before(job.end_time, f"the time limit of job {job.id} is near")
        if self.config.max_hours:
            end = self._clock() + self.config.max_hours * 3600
            self._leave_before(end, f"callback.preemption.max_hours={self.config.max_hours:g} are over")
        self._listen(PREEMPTING)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _leave_before(self, end: float, why: str) -> None:
        # Half of a time that is shorter is for work: else a job would be requeued for ever, and do none.
        margin_s = min(self.config.margin_s, (end - self._clock()) / 2)
        self._ends.append((end - margin_s, why))

    def listen_while_training(self) -> None:
        """Take over Ctrl-C, and from Lightning what it took when `fit` began: its handlers do things of their own."""
        self._listen((*PREEMPTING, signal.SIGINT))

    def _listen(self, numbers: tuple[signal.Signals, ...]) -> None:
        with suppress(ValueError):  # Python allows it in the main thread alone
            for number in numbers:
                former = signal.signal(number, self._note)
                self._former.setdefault(number, former)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        if number == signal.SIGINT and self._speaks:
            os.write(sys.stderr.fileno(), AFTER_CTRL_C)  # which may be done in the middle of anything

    @property
    def why(self) -> str:
        """The reason to leave now, or nothing."""
        if self._signal is not None:
            return "Ctrl-C" if self._signal == signal.SIGINT else f"received {self._signal.name}"
        now = self._clock()
        return next((why for end, why in self._ends if now >= end), "")

    @property
    def status(self) -> int:
        """Exit status of a process that leaves for this reason."""
        return EXIT_INTERRUPTED if self._signal == signal.SIGINT else EXIT_UNFINISHED

    def requeue(self) -> str:
        """Put the job into the queue again, unless a person pressed a key or there is none; returns what to say."""
        job = this_job()
        if job is None or not self.config.requeue or self._signal == signal.SIGINT:
            return ""
        why_not = job.requeue()
        return f"not requeued   {why_not}" if why_not else f"job {job.id:<11}is in the queue again"
