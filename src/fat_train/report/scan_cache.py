"""What was seen in files that have not changed since: a check that was stopped goes on, a second one is quick.

Two files that are only ever appended to. `<name>.seen` has a record of 28 bytes a file, which NumPy reads at once
however many there are; `<name>.odd` has a line for each file that is out of the ordinary. A kill can tear their ends
alone: what is torn does not count, and its image is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from fat_train.cache import cache_folder
from fat_train.data.index import FileIndex
from fat_train.report.inspection import Inspection, Oddity

FOLDER_NAME = "check-v1"  # raise the version when the same file would be judged otherwise
RECORD = np.dtype([("key", "<u8"), ("digest", "<u8", 2), ("oddities", "<u4")])
STAT_THREADS = 16  # on a network disk most of the time is waiting
STAT_CHUNK = 4096
NO_KEY = 0
"""Of a file that is not there."""


def file_keys(index: FileIndex) -> UInt64[np.ndarray, " N"]:
    """A number for each image that is another one when the file is: from path, size and time of the last change.

    An image in an archive has that of the archive, with its place in it.
    """
    starts = range(0, len(index), STAT_CHUNK)
    with ThreadPoolExecutor(STAT_THREADS) as pool:
        chunks = pool.map(lambda start: _keys(index, range(start, min(start + STAT_CHUNK, len(index)))), starts)
        return np.fromiter(chain.from_iterable(chunks), np.uint64, len(index))


def _keys(index: FileIndex, rows: range) -> list[int]:
    keys, last, stat = [], "", b""
    for row in rows:
        place = index.place(row)
        if place.file != last:  # the members of an archive come one after another
            last = place.file
            try:
                found = os.stat(last)  # noqa: PTH116  # a Path costs as much as the call
                stat = f"{found.st_size} {found.st_mtime_ns}".encode()
            except OSError:
                stat = b""
        name = f"{place.file}\0{place.offset} {place.size}\0".encode(errors="surrogateescape")
        digest = hashlib.blake2b(name + stat, digest_size=8).digest()
        keys.append(int.from_bytes(digest, "little") if stat else NO_KEY)
    return keys


class ScanCache:
    """The images that earlier checks of a data set have seen."""

    def __init__(self, root: Path) -> None:
        name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
        self._seen_file = cache_folder() / FOLDER_NAME / f"{name}.seen"
        self._odd_file = self._seen_file.with_suffix(".odd")
        self.trouble: str | None = None
        """Why nothing can be kept, in words for the user."""
        self._odd: dict[int, list[Oddity]] = {}
        seen = np.empty(0, RECORD)
        try:
            self._seen_file.parent.mkdir(parents=True, exist_ok=True)
            _cut(self._seen_file, lambda file: file.stat().st_size // RECORD.itemsize * RECORD.itemsize)
            _cut(self._odd_file, lambda file: file.read_bytes().rfind(b"\n") + 1)
            seen = np.fromfile(self._seen_file, RECORD)
            self._odd = dict(map(_parsed, self._odd_file.read_text().splitlines()))
        except (OSError, ValueError) as error:
            folder = self._seen_file.parent
            self.trouble = f"Warning: what is read cannot be kept in {folder} ({error}): a later check starts over"
            seen = seen[:0]
        known = np.fromiter((key for key, found in self._odd.items()), np.uint64, len(self._odd))
        whole = (seen["oddities"] == 0) | np.isin(seen["key"], known)
        self._seen = seen[whole][np.argsort(seen["key"][whole], kind="stable")]

    def look_up(self, keys: UInt64[np.ndarray, " N"]) -> Int64[np.ndarray, " N"]:
        """Row of each image among those seen, or -1."""
        if not len(self._seen):
            return np.full(len(keys), -1)
        rows = np.minimum(np.searchsorted(self._seen["key"], keys), len(self._seen) - 1)
        return np.where((self._seen["key"][rows] == keys) & (keys != NO_KEY), rows, -1)

    def digests(self, rows: Int64[np.ndarray, " n"]) -> UInt64[np.ndarray, "n 2"]:
        """The hashes of some of those seen."""
        return self._seen["digest"][rows]

    def oddities(self, row: int) -> list[Oddity]:
        """What was out of the ordinary about one of those seen."""
        record = self._seen[row]
        return self._odd[int(record["key"])] if record["oddities"] else []

    def add(self, keys: UInt64[np.ndarray, " n"], seen: Sequence[Inspection]) -> None:
        """Keep what some images have shown. The records go last: one that is there whole has its line."""
        there = [(int(key), inspection) for key, inspection in zip(keys, seen, strict=True) if key != NO_KEY]
        odd = [json.dumps([key, inspection.oddities]) + "\n" for key, inspection in there if inspection.oddities]
        records = np.empty(len(there), RECORD)
        for record, (key, shown) in zip(records, there, strict=True):
            record["key"], record["oddities"] = key, len(shown.oddities)
            record["digest"] = np.frombuffer(shown.digest, "<u8")
        if self.trouble is None:
            try:
                _append(self._odd_file, "".join(odd).encode())
                _append(self._seen_file, records.tobytes())
            except OSError as error:
                self.trouble = f"Warning: what is read cannot be kept any more ({error}): a later check reads it again"


def _parsed(line: str) -> tuple[int, list[Oddity]]:
    key, oddities = json.loads(line)
    return key, [Oddity(*oddity) for oddity in oddities]


def _cut(file: Path, whole: Callable[[Path], int]) -> None:
    """Take the torn end off a file, and make it where it is not there."""
    file.touch()
    length = whole(file)
    if length < file.stat().st_size:
        os.truncate(file, length)


def _append(file: Path, data: bytes) -> None:
    if data:
        with file.open("ab", buffering=0) as out:  # one write a call: what two checks at once append stays whole
            out.write(data)
