"""Where the time of a training step goes, in a real training: a clock in the place of Lightning's profiler.

Lightning tells its profiler when the fetching of a batch, the copy to the device, each hook, the backward pass and the
optimiser's step begin and end. Augmentation, model and loss, of which it knows nothing, are wrapped from outside: a
compiled model keeps its graph. Each moment of the training's thread counts for exactly one part.
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.profilers import Profiler
from torch import nn

from fat_train.benchmark.host_waits import HostReads, SyncWatch, Waits
from fat_train.benchmark.step import PARTS, TRACED_UPDATES, Mark, Row, Window, put_on_device

HOOKS = {
    "on_before_batch_transfer": "copy",
    "on_after_batch_transfer": "copy",
    "configure_gradient_clipping": "clip",
    "optimizer_step": "optimizer",
    "optimizer_zero_grad": "optimizer",
    "lr_scheduler_step": "optimizer",
}
FETCH, LAST_HOOK = ".train_dataloader_next", "TrainingModule.on_train_batch_end"


@lru_cache(maxsize=1024)
def part_of(action: str) -> str | None:
    """The part that one of the profiler's actions is, by Lightning's name for it; None belongs to what it lies in."""
    if action in PARTS:
        return action
    owner, _, hook = action.rpartition(".")
    if action.endswith(FETCH):
        return "data"
    if owner.startswith("[Strategy]"):
        return {"batch_to_device": "copy", "backward": "backward"}.get(hook)
    if owner.startswith("[Callback]"):
        return "ema" if owner == "[Callback]EMA" else "callbacks"
    if owner.startswith("[LightningModule]"):
        return HOOKS.get(hook, "callbacks" if hook.startswith("on_") else None)
    return None


class StepClock(Profiler):
    """Splits the updates of a `Window` into `PARTS`, on the host and, with events, on a CUDA device.

    The device is waited for before the first update that counts and after the last one, and nowhere between.

    Args:
        window: which updates count.
        accumulate: micro-batches of an update.
        log_every_n_steps: in these updates the host may wait for the device.
        cuda: whether the run's device is a CUDA one.
        trace: file of a Chrome trace of the updates after those that count; None for none.
    """

    def __init__(
        self, window: Window, *, accumulate: int, log_every_n_steps: int, cuda: bool, trace: Path | None
    ) -> None:
        super().__init__()
        self.window = window
        self.rows: list[Row] = []
        self.turns: list[Row] = []
        """Updates at the turn of an epoch; they do not count."""
        self.waits = Waits()
        self.peak_bytes = 0
        self._accumulate = accumulate
        self._log_every_n_steps = log_every_n_steps
        self._cuda = cuda
        self._trace = trace
        self._batches = 0
        self._stack = ["rest"]  # of all that has begun and not ended
        self._part = "rest"
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()
        self._update = 0
        self._marks: list[tuple[int, str, float, torch.cuda.Event]] = []
        self._on_device = ""  # the part that the newest mark has begun
        self._counts = False
        self._reads: HostReads | None = None
        self._syncs: SyncWatch | None = None
        self._tracer: torch.profiler.profile | None = None
        self._ranges: list[torch.profiler.record_function | None] = []

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with its time put down to `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop(part)

        return timed

    def attach(self, task: Any) -> None:
        """Time a task's own parts: what it prepares, its model and its loss."""
        task.prepare = self.around("augment", task.prepare)
        task.model = self.around("forward", self._unread(task.model) if is_compiled(task.model) else task.model)
        task.loss = self.around("loss", task.loss)

    def _unread(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Dynamo takes no call of it while each operator is looked at."""

        def unread(*args: Any, **kwargs: Any) -> Any:
            reads, self._reads = self._reads, None
            if reads is None:
                return function(*args, **kwargs)
            reads.__exit__(None, None, None)
            try:
                return function(*args, **kwargs)
            finally:
                reads.__enter__()
                self._reads = reads

        return unread

    def close(self) -> None:
        """Look at nothing any more, however the training ended."""
        if self._reads is not None:
            self._reads.__exit__(None, None, None)
        if self._syncs is not None:
            self._syncs.__exit__()
        self._reads = self._syncs = None

    def start(self, action_name: str) -> None:
        """Something begins."""
        if action_name.endswith(FETCH):
            if self._batches % self._accumulate == 0:
                self._next_update(self._batches // self._accumulate)
            self._batches += 1
        part = part_of(action_name) or self._stack[-1]
        self._pass_to(part)
        self._stack.append(part)
        if self._tracer is not None:
            self._ranges.append(torch.profiler.record_function(PARTS.get(action_name, action_name)).__enter__())

    def stop(self, action_name: str) -> None:
        """It has ended."""
        if self._tracer is not None and (shown := self._ranges.pop()) is not None:
            shown.__exit__(None, None, None)
        self._stack.pop()
        self._pass_to(self._stack[-1])
        if self._reads is not None and action_name.endswith(LAST_HOOK) and self._batches % self._accumulate == 0:
            self._reads.__exit__(None, None, None)
            self._reads = None

    def _pass_to(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self._part] += now - self._since
        self._since, self._part = now, part
        if self._counts and self._cuda and part not in ("rest", self._on_device):
            self._mark(part, now)

    def _mark(self, part: str, now: float) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._on_device = part
        self._marks.append((self._update, part, now, event))

    def _next_update(self, update: int) -> None:
        """Between two updates: put the last one down, and begin or end what lies at this place of the window."""
        self._pass_to("rest")
        self._close_row()
        self._update = update + 1
        window = self.window
        if update == window.first:
            self._begin()
        if update == window.end:
            self._finish()
            if self._trace is not None:
                self._begin_trace()
        if self._tracer is not None and update == window.end + TRACED_UPDATES:
            self._end_trace()
        if update == window.probe and not self._cuda:
            self._reads = HostReads(self.waits)
            self._reads.__enter__()
        if self._syncs is not None:
            self._syncs.is_silent = self._update % self._log_every_n_steps == 0
        self._seconds, self._since, self._on_device = defaultdict(float), time.perf_counter(), ""

    def _close_row(self) -> None:
        if self._counts:
            row = Row(self._update, {part: self._seconds[part] for part in PARTS if part in self._seconds})
            (self.turns if self.window.is_turn(self._update - 1) else self.rows).append(row)

    def _begin(self) -> None:
        self._counts = True
        if not self._cuda:
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._origin = torch.cuda.Event(enable_timing=True)
        self._origin.record()
        torch.cuda.synchronize()
        self._host_origin = time.perf_counter()
        self._syncs = SyncWatch(self.waits, lambda: self._part)
        self._syncs.__enter__()

    def _finish(self) -> None:
        self._counts = False
        if self._syncs is not None:
            self._syncs.__exit__()
            self._syncs = None
            self._mark("end", time.perf_counter())
            torch.cuda.synchronize()
            marks = [
                Mark(update, part, host - self._host_origin, self._origin.elapsed_time(event) / 1000)
                for update, part, host, event in self._marks
            ]
            put_on_device([*self.rows, *self.turns], marks)
            self.peak_bytes = torch.cuda.max_memory_allocated()
        else:
            self.peak_bytes = peak_of_process()

    def _begin_trace(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._cuda:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracer = torch.profiler.profile(activities=activities)
        with _stderr_closed():
            self._tracer.start()
        self._ranges = [None] * (len(self._stack) - 1)  # what has begun before is not shown

    def _end_trace(self) -> None:
        assert self._tracer is not None
        assert self._trace is not None
        with _stderr_closed():
            self._tracer.stop()
        self._trace.parent.mkdir(parents=True, exist_ok=True)
        self._tracer.export_chrome_trace(str(self._trace))
        self._tracer = None


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is."""
    return any(module._compiled_call_impl is not None for module in model.modules())


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """The profiler's library tells of its own beginning and end, and of a GPU that is not there."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class StopAfter(Callback):
    """Ends a training after so many updates, on all ranks at the same one."""

    def __init__(self, updates: int) -> None:
        self._updates = updates

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """The loop asks for this between two batches."""
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self._updates


def peak_of_process() -> int:
    """Most bytes of memory that this process has held, its imports included; 0 where the system does not tell."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
