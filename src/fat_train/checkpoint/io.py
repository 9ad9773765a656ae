"""Files that are whole or not there: a killed process or a full disk never costs the one before."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fat_train.types import UserError

ROOM_BESIDE_TENSORS = 2**20
"""Bytes that a checkpoint may need beside its tensors."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the place of `path` when the block ends well, and is deleted otherwise.

    The file's bytes are on the disk before it bears the name, and the name is before this returns.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file so that no reader, and no kill, ever sees half of it.

    Raises:
        UserError: the system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_bytes(text.encode(errors="surrogateescape"))  # names of files may be any bytes
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def write_checkpoint(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write what `torch.load(weights_only=True)` reads; not atomic: use it under `replacing`.

    Raises:
        OSError: the disk is full, or refuses the write.
    """
    needed = ROOM_BESIDE_TENSORS + sum(tensor.nbytes for tensor in tensors_of(checkpoint))
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        wants = f"{os.strerror(errno.ENOSPC)} ({needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free)"
        raise OSError(errno.ENOSPC, wants, str(path))
    try:
        torch.save(checkpoint, path)
    except RuntimeError as error:  # torch's writer does not say why; the system does when it is asked for the room
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, needed)
        raise OSError(errno.EIO, str(error).splitlines()[0], str(path)) from error


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint file, or nothing. Reads it whole: torch's files are zip archives, which keep a
    CRC-32 of everything that is in them."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"the checksum of its part {bad} does not hold"
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # the archive's own records have no checksum
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # whatever a reader makes of wrong bytes
        return f"it is cut short, or no checkpoint ({type(error).__name__})"
    return ""


def link_or_copy(source: Path, name: Path) -> None:
    """Give a file a second name, atomically; where the file system knows no links, a copy."""
    beside = name.with_name(f".{name.name}.{os.getpid()}.part")
    beside.unlink(missing_ok=True)
    try:
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
            sync(beside)
        beside.replace(name)
    finally:
        beside.unlink(missing_ok=True)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """All tensors in nested dictionaries, lists and tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for branch in tree.values():
            yield from tensors_of(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from tensors_of(branch)


def sync(path: Path) -> None:
    """Return when the disk has all of a file, or of a folder's names."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
