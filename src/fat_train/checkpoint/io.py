"""Writing a checkpoint so that a killed process or a full disk never costs the one before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fat_train.types import UserError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that takes the place of `path` when the block ends well, and leaves it alone otherwise."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that no reader, and no kill, ever sees half of it.

    Raises:
        UserError: the system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode(errors="surrogateescape"))  # names of files may be any bytes
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside, flush to the disk, then rename: at every moment the name holds a whole file, old or new."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Replace `path` by a file that holds `checkpoint`.

        Raises:
            UserError: the disk is full or refuses the write; the previous file is as it was.
        """
        assert storage_options is None, "storage options are for remote file systems"
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch's zip writer hides ENOSPC in a RuntimeError
            kept = f"; the previous {path.name} is untouched" if path.exists() else ""
            raise UserError(
                f"could not save the checkpoint {path}: {_reason(error)}{kept}. "
                "Free some space, or give folder=<folder> on another disk; the same command then resumes."
            ) from error


def _reason(error: BaseException) -> str:
    """The operating system's word on a failed write, dug out of whatever wraps it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0] if str(error) else type(error).__name__
