"""Checkpoints written beside the training: it goes on while they are copied, and while they are written.

Three things happen to a checkpoint. What changes with every forward pass (BatchNorm's statistics, counters) is copied
at once; it is small. Weights, moments and averages change in the optimiser's step alone: a thread copies them while the
next forward and backward pass run, and only the step after waits for it. Then the thread writes, and names the file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from fat_train.checkpoint.io import link_or_copy, replacing, tensors_of, write_checkpoint
from fat_train.threads import torch_threads


@dataclass(frozen=True)
class WriteOrder:
    """What is to become of a checkpoint, handed to `Trainer.save_checkpoint` as its `storage_options`."""

    also_as: tuple[Path, ...] = ()
    """Further names of the same file, given before its own."""
    keep_former_as: Path | None = None
    """Name for the file that the new one replaces."""
    then_delete: tuple[Path, ...] = ()
    """Files that are not wanted once the new one is there."""
    still: frozenset[int] = frozenset()
    """Addresses (`Tensor.data_ptr`) of tensors that stay as they are until the next optimiser step."""


@dataclass
class WriterTimes:
    """Seconds that checkpoints have cost so far, and where."""

    handing_over_s: list[float] = field(default_factory=list)
    """In the training's thread, each until the training could go on."""
    waiting_s: list[float] = field(default_factory=list)
    """In the training's thread, before the next optimiser step, until the copy was made."""
    copying_s: list[float] = field(default_factory=list)
    """In the background."""
    writing_s: list[float] = field(default_factory=list)
    """In the background."""


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Lightning's door to the disk. At every moment each name holds a whole file, old or new.

    A write that fails (full disk, lost folder) changes nothing on the disk and raises nothing: `take_failure` tells, so
    that the run may go on and try again.
    """

    def __init__(self) -> None:
        self.times = WriterTimes()
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._copied_on_device: torch.cuda.Event | None = None
        self._is_copied_for_training = True
        self._failure: tuple[Path, OSError] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is still on its way to the disk."""
        return self._writing is not None and not self._writing.done()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Begin to write; waits for the former checkpoint if that is still being written.

        Args:
            checkpoint: nested dictionaries, lists and tuples of tensors and plain values.
            path: its name.
            storage_options: a `WriteOrder`, or None for one without wishes.
        """
        order = storage_options or WriteOrder()
        assert isinstance(order, WriteOrder)
        self.flush()
        started = time.perf_counter()
        copies = _Copies(checkpoint, order.still)
        self._copied.clear()
        self._is_copied_for_training = False
        if self._thread is None:
            self._thread = torch_threads(1)
        self._writing = self._thread.submit(self._write, copies, Path(path), order)
        self.times.handing_over_s.append(time.perf_counter() - started)

    def wait_for_copy(self) -> None:
        """To be called before anything changes the weights: returns when the pending checkpoint has its own copy."""
        if not self._is_copied_for_training:
            self._is_copied_for_training = True
            started = time.perf_counter()
            self._copied.wait()
            if self._copied_on_device is not None:
                torch.cuda.current_stream().wait_event(self._copied_on_device)  # the device waits, not the host
            self.times.waiting_s.append(time.perf_counter() - started)

    def flush(self) -> None:
        """Return when everything is on the disk, or has failed."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def take_failure(self) -> tuple[Path, OSError] | None:
        """The newest write that failed since the last question, if any."""
        failure, self._failure = self._failure, None
        return failure

    def teardown(self) -> None:
        """Finish what is begun."""
        self.flush()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def _write(self, copies: _Copies, path: Path, order: WriteOrder) -> None:
        try:
            started = time.perf_counter()
            try:
                self._copied_on_device = copies.begin()
            finally:
                self._copied.set()
            checkpoint = copies.finish()
            copied = time.perf_counter()
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                write_checkpoint(checkpoint, beside)
                for name in order.also_as:
                    link_or_copy(beside, name)
                if order.keep_former_as is not None and path.exists():
                    link_or_copy(path, order.keep_former_as)
            for name in order.then_delete:
                name.unlink(missing_ok=True)
            self.times.copying_s.append(copied - started)
            self.times.writing_s.append(time.perf_counter() - copied)
        except OSError as error:
            self._failure = (path, error)


class _Copies:
    """A checkpoint whose tensors are copied in two goes: the changeable ones now, the others by `begin`."""

    def __init__(self, checkpoint: dict[str, Any], still: frozenset[int]) -> None:
        device = next((tensor.device for tensor in tensors_of(checkpoint) if tensor.is_cuda), None)
        self._tree = _mapped(
            checkpoint, lambda tensor: tensor.detach() if tensor.data_ptr() in still else tensor.detach().clone()
        )
        self._still = still
        self._stream = torch.cuda.Stream(device) if device is not None else None
        self._given = torch.cuda.current_stream(device).record_event() if device is not None else None

    def begin(self) -> torch.cuda.Event | None:
        """Copy; on a GPU only queue the copies, in a stream of their own that waits for what had been queued when the
        checkpoint was made, and return the event of their end."""
        if self._stream is None:
            self._tree = _mapped(
                self._tree, lambda tensor: tensor.clone() if tensor.data_ptr() in self._still else tensor.cpu()
            )
            return None
        assert self._given is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._given)
            self._on_device, self._tree = self._tree, _mapped(self._tree, _to_pinned)
            return self._stream.record_event()

    def finish(self) -> Any:
        """The checkpoint with tensors of its own on the CPU."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._tree


def _to_pinned(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        new = copy(tree)  # state dicts have attributes beside their items
        new.update((key, _mapped(branch, change)) for key, branch in tree.items())
        return new
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(branch, change) for branch in tree)
    return tree


def addresses(tensors: Iterable[Tensor]) -> frozenset[int]:
    """For `WriteOrder.still`."""
    return frozenset(tensor.data_ptr() for tensor in tensors)
