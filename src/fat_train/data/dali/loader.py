"""The loader over DALI: our order and our draws are fed in, pictures come out, several runs ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.pipeline import Pipeline
from torch import Tensor

from fat_train.augment.policy import AugmentConfig
from fat_train.data.archive import OpenArchives
from fat_train.data.dali.graph import (
    ENCODED,
    Execution,
    build_eval_pipeline,
    build_train_pipeline,
    feed_draws,
    feed_encoded,
    feed_paths,
)
from fat_train.data.index import FileIndex, Place
from fat_train.data.loader import Loader, Planned
from fat_train.data.order import Order
from fat_train.data.picture import PictureSpec, read_rgb, unreadable
from fat_train.types import Batch, UserError

RUNS_AHEAD = 3
ANNOUNCED_AHEAD = 4
"""Batches between the word to the disk and the feeding."""


class DaliLoader(Loader):
    """Decodes and augments in DALI's threads, or on a GPU. One pipeline serves all epochs."""

    def __init__(
        self,
        index: FileIndex,
        order: Order,
        augment: AugmentConfig | None,
        spec: PictureSpec,
        *,
        num_threads: int,
        gpu: torch.device | None,
    ) -> None:
        super().__init__(index, order, augment, spec.image_px)
        self.spec = spec
        self.num_threads = num_threads
        self.device_id = None if gpu is None else gpu.index or 0
        self._copying = None if gpu is None else torch.cuda.Stream(gpu)
        self._archives = None if index.members is None else OpenArchives(index)
        self._pipeline: Pipeline | None = None
        self._under_way: deque[Planned] = deque()

    def _load(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        pipeline = self._idle_pipeline()
        if self._archives is not None:
            planned = _announced(planned, self._archives)
        self._schedule(pipeline, planned)
        while self._under_way:
            try:
                (outputs,) = pipeline.share_outputs()
            except RuntimeError as error:
                under_way = list(self._under_way)
                self._discard()
                raise self._blame(under_way, error) from error
            images = self._own(outputs.as_tensor())
            pipeline.release_outputs()
            finished = self._under_way.popleft()
            self._schedule(pipeline, planned)
            yield self._batch_of(finished, images)

    def _own(self, output: Any) -> UInt8[Tensor, "B H W 3"]:
        """Make a run's output safe to keep; `share_outputs` has waited until it is complete."""
        if self._copying is None:
            return torch.from_dlpack(output)  # the dynamic executor does not reuse a buffer that is referred to
        # On a GPU the reference may go while kernels that read the buffer are still queued: copy it, and wait for the
        # copy alone, not for the training stream.
        with torch.cuda.stream(self._copying):
            copy = torch.from_dlpack(output).clone()
        self._copying.synchronize()
        copy.record_stream(torch.cuda.current_stream(copy.device))
        return copy

    def _schedule(self, pipeline: Pipeline, planned: Iterator[Planned]) -> None:
        while len(self._under_way) < RUNS_AHEAD and (batch := next(planned, None)) is not None:
            if self._archives is None:
                feed_paths(pipeline, [str(place) for place in self._places(batch)])
            else:
                feed_encoded(pipeline, self._archives.images(batch.plan.indices))
            if batch.draws is not None:
                feed_draws(pipeline, batch.draws, self.spec)
            pipeline.schedule_run()
            self._under_way.append(batch)

    def _places(self, planned: Planned) -> list[Place]:
        return [self.index.place(row) for row in planned.plan.indices]

    def _idle_pipeline(self) -> Pipeline:
        try:
            while self._pipeline is not None and self._under_way:  # left there by an iteration that was broken off
                self._pipeline.share_outputs()
                self._pipeline.release_outputs()
                self._under_way.popleft()
        except RuntimeError:
            self._discard()  # an unreadable file that nobody is waiting for
        if self._pipeline is None:
            self._pipeline = self._build()
        return self._pipeline

    def _build(self) -> Pipeline:
        archives = self._archives is not None
        execution = Execution(self.order.batch_per_device, self.num_threads, self.device_id, archives=archives)
        if self.augment is None:
            return build_eval_pipeline(self.spec, execution)
        return build_train_pipeline(self.spec, self.augment, execution)

    def _discard(self) -> None:
        self._pipeline = None
        self._under_way.clear()

    def _blame(self, under_way: list[Planned], error: RuntimeError) -> Exception:
        """Find the file that a run failed at: DALI's message does not name it."""
        places = [place for planned in under_way for place in self._places(planned)]
        for place in places:
            try:
                read_rgb(place)
            except UserError as unreadable_file:
                return unreadable_file
        return _refused_by_dali(places) or error


def _announced(planned: Iterator[Planned], archives: OpenArchives) -> Iterator[Planned]:
    """The same plans; the disk hears of each some batches before it comes out."""
    ahead: deque[Planned] = deque()
    for batch in planned:
        archives.announce(batch.plan.indices)
        ahead.append(batch)
        if len(ahead) > ANNOUNCED_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _refused_by_dali(places: Iterable[Place]) -> UserError | None:
    for place in places:
        pipeline = _decode_graph(**Execution(max_batch=1, num_threads=1, device_id=None).arguments())
        pipeline.build()
        feed_encoded(pipeline, [np.frombuffer(place.read(), np.uint8)])
        try:
            pipeline.schedule_run()
            pipeline.share_outputs()
        except RuntimeError:
            return unreadable(place, "DALI cannot decode it, although PIL can; data.backend=torch would read it")
    return None


@pipeline_def
def _decode_graph() -> DataNode:
    encoded = fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1, no_copy=True)
    return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
