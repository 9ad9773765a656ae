"""Rows of metrics.csv on their way to a service that may fail or hang: the training feels neither."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pytorch_lightning.loggers import Logger

from fat_train.metric.record import COUNT_COLUMNS, Row, read_rows

RETRY_AFTER_S = 60.0
"""From a failure to the next attempt, which then comes with the end of an epoch, or of the run at once."""
GRACE_S = 5.0
"""Added to a service's own limit at the end, before it is taken for hung."""


class Standing(NamedTuple):
    """How far a service has got: the last update that had a row, and the last epoch (from 0) that had its own."""

    step: int = -1
    epoch: int = -1


class Service(Protocol):
    """Where rows go. Its calls may raise anything and take their time; all but `abandon` come from one thread."""

    name: str
    """As people call it."""

    def open(self) -> tuple[Standing, str]:
        """Begin, or begin again after a failure: what it has already, and a word for the user ("" for none)."""

    def write(self, values: dict[str, float]) -> None:
        """Send the points of one row, as `points` names them; `step` is always among them."""

    def check(self) -> None:
        """Raise if what was written may not have arrived."""

    def close(self, succeeded: bool) -> None:
        """Send what is still on its way, and end."""

    def abandon(self) -> None:
        """Free what a failure, or a hang, has left behind; must not wait."""


class BackgroundLogger(Logger):
    """Gives a `Service` the rows of metrics.csv, to the bit, each once, from a thread of its own.

    The callback that writes metrics.csv hands its rows over; Lightning's own `self.log` takes no part. First the rows
    that stand in the file and that the service lacks are sent: those of the processes before a resume, or what was lost
    with a process or with the service. After a failure it is the same: at the end of an epoch, a minute later at the
    soonest, and at the run's end the service is opened again and sent what it lacks. The first failure is said, and
    what becomes of it; those between are not.

    Nothing here raises, and the training waits for nothing but, at its end and for `wait_s`, the rest to be sent.

    Args:
        service: where to.
        metrics: the run's metrics.csv.
        wait_s: longest wait at the end.
    """

    def __init__(self, service: Service, metrics: Path, *, wait_s: float) -> None:
        super().__init__()
        self._service = service
        self._metrics = metrics
        self._wait_s = wait_s
        self._rows: queue.SimpleQueue[dict[str, float] | bool] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._standing = Standing()
        self._is_open = False
        self._has_files_rows = False
        self._is_left_alone = False
        self._failed_at: float | None = None
        self._reason = ""

    @property
    def name(self) -> str:
        """The service's."""
        return self._service.name

    @property
    def version(self) -> str:
        """Runs have names and no versions."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self._metrics.parent)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: a service has the configuration from its builder."""

    def save(self) -> None:
        """Lightning's call when a fit begins: the service is opened while the first batch is on its way."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"{self.name} rows", daemon=True)
            self._thread.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # noqa: ARG002  # a row has it
        """Take a row of metrics.csv; an empty one says that the file's own rows stand, and may be sent."""
        self.save()
        self._rows.put(dict(metrics))

    def finalize(self, status: str) -> None:
        """Let the rest be sent, for a bounded time."""
        if self._thread is None:
            return
        self._rows.put(status == "success")
        self._thread.join(self._wait_s + GRACE_S)
        if self._thread.is_alive():
            self._is_left_alone = True
            self._say(f"has not ended within {self._wait_s + GRACE_S:g} s; it is left alone, {self._metrics} is whole")
            self._free()
        self._thread = None

    def _work(self) -> None:
        self._attempt(self._open)
        while isinstance(item := self._rows.get(), dict):
            if self._is_open or ("epoch_s" in item and self._may_retry and self._attempt(self._open)):
                self._attempt(self._take, item)
        for _ in range(2):  # what has failed, or fails only now, is tried once more
            if self._attempt(self._close, item) or self._is_left_alone:
                return
        self._say(f"not whole ({self._reason}); {self._metrics} has every row")

    @property
    def _may_retry(self) -> bool:
        return self._failed_at is None or time.monotonic() - self._failed_at >= RETRY_AFTER_S

    def _attempt(self, call: Callable[..., None], *arguments: Any) -> bool:
        """Whether a call went well."""
        try:
            call(*arguments)
        except (Exception, SystemExit) as error:
            if self._is_left_alone:
                return False
            self._is_open = False
            self._free()
            self._reason = _reason(error)
            if self._failed_at is None:
                self._say(f"failed ({self._reason}); the run goes on, {self._metrics} has every row. Tried again later")
            self._failed_at = time.monotonic()
            return False
        return True

    def _free(self) -> None:
        with contextlib.suppress(Exception, SystemExit):
            self._service.abandon()

    def _open(self) -> None:
        self._standing, word = self._service.open()
        self._is_open, self._has_files_rows = True, False
        if self._failed_at is not None:
            word = f"goes on with every row; {word}" if word else "goes on with every row"
        if word:
            self._say(word)

    def _take(self, row: dict[str, float]) -> None:
        if not self._has_files_rows:
            for cells in read_rows(self._metrics):
                self._send(numbers(cells))
            self._has_files_rows = True
        self._send(row)
        if "epoch_s" in row:
            self._service.check()
            self._failed_at = None

    def _send(self, row: dict[str, float]) -> None:
        """Write a row that the service does not have yet."""
        if "epoch_s" in row and row["epoch"] > self._standing.epoch:
            self._standing = self._standing._replace(epoch=int(row["epoch"]))
        elif row and "epoch_s" not in row and row["step"] > self._standing.step:
            self._standing = self._standing._replace(step=int(row["step"]))
        else:
            return
        self._service.write(points(row))

    def _close(self, succeeded: bool) -> None:
        if not self._is_open:
            self._open()
        self._take({})
        self._service.check()
        self._service.close(succeeded)
        self._is_open = False

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            print(f"{self.name:<15}{text}\n", end="", flush=True)  # one write: the main thread prints too


def numbers(row: Row) -> dict[str, float]:
    """The cells of a row that hold something, as the numbers that were written."""
    return {name: int(cell) if name in COUNT_COLUMNS else float(cell) for name, cell in row.items() if cell}


def points(row: dict[str, float]) -> dict[str, float]:
    """What a plot gets of a row.

    The row of an epoch's last updates and the epoch's own are of the same `step`: the latter's `train/loss`, `lr` and
    `images_per_s` get names of their own, `train/loss_epoch` and so on. It alone has `epoch`, which counts from 0.
    """
    if "epoch_s" not in row:
        return {name: value for name, value in row.items() if name != "epoch"}
    return {f"{name}_epoch" if name in ("train/loss", "lr", "images_per_s") else name: row[name] for name in row}


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
