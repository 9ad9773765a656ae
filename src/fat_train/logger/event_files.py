"""TensorBoard's event files, written in full view of the disk's errors."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import text

from fat_train.logger.background import Standing


class EventFiles:
    """Each start writes a file of its own that holds the whole history and takes the place of the earlier ones.

    That is TensorBoard's mark of a restarted run: points of earlier files from its step on, here from the first, are no
    longer shown. torch's `SummaryWriter` would do, but writes in a thread whose death by a full disk prints a stack
    trace. Values are float32 there.

    Args:
        folder: of the event files.
        config: plain values of the whole configuration, shown under "text".
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._file: IO[bytes] | None = None

    def open(self) -> tuple[Standing, str]:
        """A new file; TensorBoard reads them in the order of their names, which begin with the time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = (self._folder / name).open("xb")
        self._record(file_version="brain.Event:2")
        self._record(session_log=SessionLog(status=SessionLog.START))
        lines = json.dumps(self._config, indent=2).splitlines()
        self._record(summary=text("config", "\n".join(f"    {line}" for line in lines)))
        return Standing(), ""

    def write(self, values: dict[str, float]) -> None:
        """One event, over the number of finished updates."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if name != "step"]
        self._record(step=int(values["step"]), summary=Summary(value=scalars))

    def _record(self, **fields: Any) -> None:
        assert self._file is not None
        RecordWriter(self._file).write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def check(self) -> None:
        """Nothing is held back here: a write that failed has raised."""

    def close(self, succeeded: bool) -> None:  # noqa: ARG002  # there is no mark for a run that failed
        """The end of the file."""
        assert self._file is not None
        self._file.close()

    def abandon(self) -> None:
        """The end of the file; half a record at its end keeps no reader from going on to the next file."""
        if self._file is not None:
            self._file.close()
