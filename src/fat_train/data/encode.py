"""Images made ready for a shard, many at a time: read, decoded to the end, made smaller, encoded."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import NamedTuple

from PIL import Image

from fat_train.data.index import FileIndex, Place
from fat_train.data.picture import READ_ERRORS, read_rgb
from fat_train.types import UserError

FILTER = Image.Resampling.LANCZOS
"""Of PIL's filters the one that keeps the most of the detail just below the new limit: on ImageNet photographs that are
shrunk to 320 pixels, the pictures that validation then makes differ 5 % less from the original's than with bicubic."""
SUBSAMPLING = "4:2:0"
CHUNK = 16
CHUNKS_AHEAD_PER_WORKER = 2


class Recipe(NamedTuple):
    """How an image is stored."""

    short_side_px: int | None
    """Shorter side that larger images are made smaller to; None leaves all as large as they are."""
    quality: int
    """JPEG quality of those that are encoded anew."""


class Encoded(NamedTuple):
    """An image in the form in which it is stored."""

    content: bytes
    """A JPEG file."""
    source_bytes: int
    """Size of what it was made from."""


def encode_image(place: Place, recipe: Recipe) -> Encoded:
    """Make a plain RGB JPEG of an image, small enough; one that is this already is kept byte for byte.

    An EXIF orientation is not applied, as it is not in training.

    Raises:
        UserError: it cannot be read to its end.
    """
    try:
        source = place.read()
        with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(io.BytesIO(source)) as image:
            is_plain = image.format == "JPEG" and image.mode == "RGB"
            rgb = image.convert("RGB")
    except READ_ERRORS:
        read_rgb(place)  # has the words for it
        raise
    short_side = min(rgb.size)
    shrinks = recipe.short_side_px is not None and short_side > recipe.short_side_px
    if is_plain and not shrinks:
        return Encoded(source, len(source))
    if shrinks:
        assert recipe.short_side_px is not None
        width, height = (round(side * recipe.short_side_px / short_side) for side in rgb.size)
        rgb = rgb.resize((width, height), FILTER)
    rgb.info.clear()  # a comment would be written too
    content = io.BytesIO()
    rgb.save(content, "JPEG", quality=recipe.quality, subsampling=SUBSAMPLING)
    return Encoded(content.getvalue(), len(source))


class EncodingPool:
    """Processes that encode; results come in order, and only so far ahead as memory need be spent on."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> EncodingPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def encode(self, index: FileIndex, rows: Sequence[int], split: str, recipe: Recipe) -> Iterator[Encoded]:
        """Encode some rows of a split, in their order.

        Raises:
            UserError: an image cannot be read; it is named, with a way around it.
        """
        chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
        for chunk, answers in zip(chunks, self._answers(index, chunks, recipe), strict=True):
            for row, answer in zip(chunk, answers, strict=False):  # the answers end with the first error
                if isinstance(answer, UserError):
                    line = f"{split}/{index.paths[row]}"
                    raise UserError(f"{answer}; data.exclude=<file> leaves it out, where the file has the line {line}")
                yield answer

    def _answers(
        self, index: FileIndex, chunks: list[Sequence[int]], recipe: Recipe
    ) -> Iterator[list[Encoded | UserError]]:
        requests = ([index.place(row) for row in chunk] for chunk in chunks)
        if self.workers == 1 or (self._pool is None and len(chunks) == 1):
            yield from (_encode_chunk(places, recipe) for places in requests)
            return
        pool = self._pool = self._pool or _clean_pool(self.workers)
        under_way: deque[Future[list[Encoded | UserError]]] = deque()
        try:
            for places in requests:
                under_way.append(pool.submit(_encode_chunk, places, recipe))
                if len(under_way) > CHUNKS_AHEAD_PER_WORKER * self.workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "the system ended a process that encodes images, as it does when memory is short: give fewer than "
                f"num_workers={self.workers}; the same command goes on where it stopped"
            ) from error


def _encode_chunk(places: list[Place], recipe: Recipe) -> list[Encoded | UserError]:
    answers: list[Encoded | UserError] = []
    for place in places:
        try:
            answers.append(encode_image(place, recipe))
        except UserError as error:
            answers.append(UserError(str(error)))  # without its trace, which does not travel
            break
    return answers


def _clean_pool(workers: int) -> ProcessPoolExecutor:
    # Not forked from this process: its torch threads may hold a lock at that moment.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(["__main__", __name__])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed packing must not leave processes behind that wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
