"""Reading every image of a data set once, in parallel, and only those that have changed since the last time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np
from jaxtyping import UInt64
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fat_train.data.index import FileIndex, Place
from fat_train.report.inspection import Inspection, Oddity, inspect_image
from fat_train.report.scan_cache import ScanCache, file_keys

CHUNK = 64
CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class Scan:
    """What the images of a split have shown."""

    digests: UInt64[np.ndarray, "N 2"]
    """16 bytes an image, zeros where there are none to compare."""
    odd: dict[int, list[Oddity]]
    """Of each image that is out of the ordinary, by its row, in the order of the rows."""
    keys: UInt64[np.ndarray, " N"]
    """See `file_keys`."""
    unchanged: int
    """Images that an earlier check has read and that are as they were."""


def scan_index(name: str, index: FileIndex, cache: ScanCache | None, workers: int, console: Console | None) -> Scan:
    """Read every image of a split that the cache does not know, and keep what is seen in the cache as it comes.

    Args:
        name: of the split, for the bar.
        index: its images.
        cache: what earlier checks have seen; None reads everything and keeps nothing.
        workers: processes that read; with 1 this one does.
        console: where a bar is shown, if it is a terminal; None shows none.
    """
    keys = file_keys(index)
    digests = np.zeros((len(index), 2), np.uint64)
    odd: dict[int, list[Oddity]] = {}
    rows = np.arange(len(index))
    if cache is not None:
        at = cache.look_up(keys)
        known = at >= 0
        digests[known] = cache.digests(at[known])
        for row in rows[known].tolist():
            if oddities := cache.oddities(at[row]):
                odd[row] = oddities
        rows = rows[~known]
    chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
    places = ([index.place(row) for row in chunk.tolist()] for chunk in chunks)
    with _bar(console) as bar, _workers(workers) as pool:
        task = bar.add_task(name, total=len(rows))
        for chunk, inspections in zip(chunks, _inspected(pool, places), strict=True):
            if cache is not None:
                cache.add(keys[chunk], inspections)
            for row, (digest, oddities) in zip(chunk.tolist(), inspections, strict=True):
                digests[row] = np.frombuffer(digest, "<u8")
                if oddities:
                    odd[row] = oddities
            bar.advance(task, len(chunk))
    return Scan(digests, dict(sorted(odd.items())), keys, len(index) - len(rows))


def copies(train: Scan, val: Scan) -> tuple[dict[int, int], tuple[dict[int, int], dict[int, int]]]:
    """Images that are equal to the byte.

    Returns:
        The training images that are one of the validation images, by row, and for training and validation the images
        that are an earlier one of the same split. A file that is in both splits itself is no copy.
    """
    digests = np.concatenate([train.digests, val.digests])
    rows = np.flatnonzero(digests.any(axis=1))
    order = rows[np.lexsort(digests[rows].T)]
    if not len(order):
        return {}, ({}, {})
    new = np.append(True, (digests[order][1:] != digests[order][:-1]).any(axis=1))
    starts = np.flatnonzero(new)
    sizes = np.diff(np.append(starts, len(order)))
    across: dict[int, int] = {}
    within: tuple[dict[int, int], dict[int, int]] = ({}, {})
    for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
        group = np.sort(order[start : start + size])
        in_train = group[group < len(train.digests)].tolist()
        in_val = (group[group >= len(train.digests)] - len(train.digests)).tolist()
        for own, first in zip((in_train, in_val), within, strict=True):
            first.update(dict.fromkeys(own[1:], own[0] if own else 0))
        files = {val.keys[row] for row in in_val}
        across |= {row: in_val[0] for row in in_train if in_val and train.keys[row] not in files}
    return across, within


@contextmanager
def _workers(count: int) -> Iterator[ProcessPoolExecutor | None]:
    if count == 1:
        yield None
        return
    # Not forked from this process: its torch and DALI threads may hold a lock at that moment.
    clean = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(clean)
    context.set_forkserver_preload(["__main__", __name__])
    with ProcessPoolExecutor(count, mp_context=context, initializer=_attend) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


def _attend() -> None:
    """Leave Ctrl-C to the process that started this one, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _inspected(pool: ProcessPoolExecutor | None, chunks: Iterable[list[Place]]) -> Iterator[list[Inspection]]:
    """The chunks' images in their order; only a few chunks are under way, however many there are."""
    if pool is None:
        yield from map(_inspect_chunk, chunks)
        return
    under_way: deque[Future[list[Inspection]]] = deque()
    ahead = CHUNKS_AHEAD * (os.cpu_count() or 1)
    for chunk in chunks:
        under_way.append(pool.submit(_inspect_chunk, chunk))
        if len(under_way) >= ahead:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def _inspect_chunk(places: list[Place]) -> list[Inspection]:
    return [inspect_image(place) for place in places]


def _bar(console: Console | None) -> Progress:
    columns = (TextColumn("reading {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=console is None or not console.is_terminal, transient=True)
