"""Archives that stay open: images as stretches of mapped memory, and a word to the disk before they are wanted."""

from __future__ import annotations

import mmap
import os
import resource
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8

from fat_train.data.index import FileIndex
from fat_train.types import UserError

OTHER_FILES = 256
"""Files that a process may have open beside its archives."""


class OpenArchives:
    """The archives of an index, mapped. An image read from one is no copy, and costs its first reader the disk.

    Each takes two of the process's open files (the map keeps one of its own); their limit is raised as far as the
    system lets us. An archive that is made shorter while it is mapped ends the process (SIGBUS): replace shards by
    renaming, as `pack` does.

    Raises:
        UserError: an archive is not there any more or has become shorter, or there are more than may be open.
    """

    def __init__(self, index: FileIndex) -> None:
        assert index.members is not None
        self._at = index.members
        self._bytes: list[UInt8[np.ndarray, " size"]] = []
        self._files: list[int] = []
        weakref.finalize(self, _close, self._files)
        _allow_open_files(2 * len(self._at.archives) + OTHER_FILES)
        ends = np.zeros(len(self._at.archives), np.int64)
        np.maximum.at(ends, self._at.archive, self._at.offset + self._at.size)
        for archive, end in zip(self._at.archives, ends.tolist(), strict=True):
            self._open(index.root / archive, end)
        # One thread: reading ahead may wait where the disk has a queue already, and nobody waits for this thread.
        self._announcer = ThreadPoolExecutor(1)

    def _open(self, path: Path, end: int) -> None:
        try:
            self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            mapped = mmap.mmap(self._files[-1], 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: a file of no bytes
            reason = getattr(error, "strerror", None) or "it is empty"
            raise UserError(f"cannot open the archive {path}: {reason}") from error
        if len(mapped) < end:
            raise UserError(f"the archive {path} ends after {len(mapped):,} bytes; its last image ended at {end:,}")
        self._bytes.append(np.frombuffer(mapped, np.uint8))

    def images(self, rows: Int64[np.ndarray, " B"]) -> list[UInt8[np.ndarray, " size"]]:
        """The encoded images of some rows, as views into the archives; nothing is read yet."""
        archives, content = self._at.archive[rows].tolist(), self._bytes
        starts = self._at.offset[rows]
        ends = (starts + self._at.size[rows]).tolist()
        return [content[a][start:end] for a, start, end in zip(archives, starts.tolist(), ends, strict=True)]

    def announce(self, rows: Int64[np.ndarray, " B"]) -> None:
        """Have the disk begin with some rows' images; returns at once."""
        if hasattr(os, "posix_fadvise"):
            at = self._at
            self._announcer.submit(self._advise, at.archive[rows], at.offset[rows], at.size[rows])

    def _advise(
        self, archive: Int64[np.ndarray, " B"], offset: Int64[np.ndarray, " B"], size: Int64[np.ndarray, " B"]
    ) -> None:
        for number, start, count in zip(archive.tolist(), offset.tolist(), size.tolist(), strict=True):
            os.posix_fadvise(self._files[number], start, count, os.POSIX_FADV_WILLNEED)


def _close(files: list[int]) -> None:
    for file in files:
        os.close(file)


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (count if hard == resource.RLIM_INFINITY else min(count, hard), hard)
        )
