"""The reference loader: `fat_train.data.picture` in torch `DataLoader` workers, a batch a request."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fat_train.augment.draws import Draws
from fat_train.augment.policy import AugmentConfig
from fat_train.data.index import FileIndex, Place
from fat_train.data.loader import Loader, Planned
from fat_train.data.order import Order
from fat_train.data.picture import PictureSpec, make_pictures
from fat_train.types import Batch, UserError

BATCHES_AHEAD_PER_WORKER = 2
START_METHODS = ("forkserver", "spawn")  # a fork of this process, with its threads, stops for ever now and then


class _Request(NamedTuple):
    places: list[Place]
    draws: Draws | None


class _Pictures(Dataset[UInt8[Tensor, "B H W 3"] | UserError]):
    """Answers a request with its pictures, or with the error: raised in a worker it would arrive as a trace."""

    def __init__(self, spec: PictureSpec) -> None:
        self.spec = spec

    def __getitem__(self, request: _Request) -> UInt8[Tensor, "B H W 3"] | UserError:
        try:
            return torch.from_numpy(make_pictures(request.places, request.draws, self.spec))
        except UserError as error:
            return UserError(str(error))


class _Requests(Sampler[_Request]):
    """Feeds the plans of the current iteration to the `DataLoader`, and remembers those under way."""

    def __init__(self, index: FileIndex) -> None:
        self.index = index
        self.planned: Iterator[Planned] = iter(())
        self.under_way: deque[Planned] = deque()

    def begin(self, planned: Iterator[Planned]) -> None:
        self.planned, self.under_way = planned, deque()

    def __iter__(self) -> Iterator[_Request]:
        for planned in self.planned:
            self.under_way.append(planned)
            yield _Request([self.index.place(row) for row in planned.plan.indices], planned.draws)


class TorchLoader(Loader):
    """PIL and timm in worker processes; with none, in this one."""

    def __init__(
        self,
        index: FileIndex,
        order: Order,
        augment: AugmentConfig | None,
        spec: PictureSpec,
        *,
        num_workers: int,
        pin_memory: bool,
    ) -> None:
        super().__init__(index, order, augment, spec.image_px)
        self._requests = _Requests(index)
        self._workers: DataLoader[Tensor | UserError] = DataLoader(
            _Pictures(spec),
            batch_size=None,  # a request is a whole batch already
            sampler=self._requests,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # of seeds for workers, which draw nothing: torch's own is left alone
            persistent_workers=num_workers > 0,
            prefetch_factor=BATCHES_AHEAD_PER_WORKER if num_workers else None,
            multiprocessing_context=_worker_context() if num_workers else None,
            worker_init_fn=_end_with_the_loader,
        )

    def _load(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        self._requests.begin(planned)
        for pictures in self._workers:
            if isinstance(pictures, UserError):
                # A new one: an exception that its own frame refers to keeps the workers until a garbage collection.
                raise UserError(str(pictures))
            yield self._batch_of(self._requests.under_way.popleft(), pictures)


def _worker_context() -> BaseContext:
    method = next(name for name in START_METHODS if name in multiprocessing.get_all_start_methods())
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([__name__])  # imported once, not by every worker
    return context


def _end_with_the_loader(worker: int) -> None:
    """Workers outlive a loader that is killed: torch looks at their parent, which is the forkserver, and that one waits
    for them."""
    del worker
    loader = multiprocessing.parent_process()
    assert loader is not None

    def wait() -> None:
        loader.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _as_it_is(answer: Any) -> Any:
    return answer
