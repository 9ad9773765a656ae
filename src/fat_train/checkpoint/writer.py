"""Checkpoints written beside the training: it goes on while they are copied, and while they are written.

Three things happen to a checkpoint. What changes with every forward pass (BatchNorm's statistics, counters) is copied
at once; it is small. Weights, moments and averages change in the optimiser's step alone: a thread copies them while the
next forward and backward pass run, and only the step after waits for it. Then the thread writes, and names the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from fat_train.checkpoint.io import link_or_copy, replacing, sync, write_checkpoint
from fat_train.threads import torch_threads

CPU = torch.device("cpu")
STATE_DICTS = ("state_dict", "ema")
OPTIMIZERS = "optimizer_states"


@dataclass(frozen=True)
class WriteOrder:
    """What is to become of a checkpoint, handed to `Trainer.save_checkpoint` as its `storage_options`."""

    also_as: tuple[Path, ...] = ()
    """Further names of the same file, given before its own."""
    after: tuple[Path, ...] = ()
    """Files whose bytes are to be on the disk before it has a name: those that it relies on."""
    keep_former_as: Path | None = None
    """Name for the file that the new one replaces."""
    then_delete: tuple[Path, ...] = ()
    """Files that are not wanted once the new one is there."""
    buffers: frozenset[str] | None = None
    """Names of what a forward pass changes in the state dicts of model and average; all other tensors there, and all of
    the optimiser's, stay as they are until its next step. None knows of nothing that stays."""
    device: torch.device = CPU
    """Where those tensors are."""


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Lightning's door to the disk. At every moment each name holds a whole file, old or new.

    A write that fails (full disk, lost folder, weights that are not finite) changes nothing on the disk and raises
    nothing: `take_failure` tells, so that the run may go on and try again.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._copied_on_device: torch.cuda.Event | None = None
        self._is_copied_for_training = True
        self._failure: tuple[Path, str] | None = None

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
        copies = _Copies(checkpoint, order)
        self._copied.clear()
        self._is_copied_for_training = False
        if self._thread is None:
            self._thread = torch_threads(1)
        self._writing = self._thread.submit(self._write, copies, Path(path), order)

    def wait_for_copy(self) -> None:
        """To be called before anything changes the weights: returns when the pending checkpoint has its own copy."""
        if not self._is_copied_for_training:
            self._is_copied_for_training = True
            self._copied.wait()
            if self._copied_on_device is not None:
                torch.cuda.current_stream().wait_event(self._copied_on_device)  # the device waits, not the host

    def flush(self) -> None:
        """Return when everything is on the disk, or has failed."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def take_failure(self) -> tuple[Path, str] | None:
        """The newest checkpoint that could not be written since the last question, and why; None if all could."""
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
            try:
                self._copied_on_device = copies.begin()
            finally:
                self._copied.set()
            checkpoint = copies.finish()
            if not _is_finite(checkpoint.get("state_dict", {})):
                self._failure = (path, "its weights are no longer finite")
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as beside:
                write_checkpoint(checkpoint, beside)
                for file in filter(Path.exists, order.after):
                    sync(file)
                for name in order.also_as:
                    link_or_copy(beside, name)
                if order.keep_former_as is not None and path.exists():
                    link_or_copy(path, order.keep_former_as)
            for name in order.then_delete:
                name.unlink(missing_ok=True)
        except OSError as error:
            self._failure = (path, error.strerror or str(error))


class _Copies:
    """A checkpoint whose tensors are copied in two goes: the changeable ones now, the others by `begin`."""

    def __init__(self, checkpoint: dict[str, Any], order: WriteOrder) -> None:
        self._tree = {key: self._now(key, branch, order.buffers) for key, branch in checkpoint.items()}
        on_gpu = order.device.type == "cuda"
        self._stream = torch.cuda.Stream(order.device) if on_gpu else None
        self._given = torch.cuda.current_stream(order.device).record_event() if on_gpu else None

    def _now(self, key: str, branch: Any, buffers: frozenset[str] | None) -> Any:
        if buffers is not None and key == OPTIMIZERS:
            return branch
        if buffers is not None and key in STATE_DICTS:
            return _mapped(branch, lambda tensor, name: tensor.clone() if name in buffers else tensor)
        return _mapped(branch, lambda tensor, _: tensor.detach().clone())

    def begin(self) -> torch.cuda.Event | None:
        """Copy; on a GPU only queue the copies, in a stream of their own that waits for what had been queued when the
        checkpoint was made, and return the event of their end."""
        if self._stream is None:
            self._tree = _mapped(self._tree, lambda tensor, _: tensor.to(CPU, copy=True))
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


def _is_finite(state: Mapping[str, Tensor]) -> bool:
    values = [value for value in state.values() if value.is_floating_point()]
    return not values or bool(torch.stack(torch._foreach_norm(values)).isfinite().all())


def _to_pinned(tensor: Tensor, _: str) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _mapped(tree: Any, change: Callable[[Tensor, str], Tensor], name: str = "") -> Any:
    """Nested containers with each tensor replaced by what `change` makes of it and of its key."""
    if isinstance(tree, Tensor):
        return change(tree, name)
    if isinstance(tree, dict):
        new = copy(tree)  # state dicts have attributes beside their items
        for key, branch in tree.items():
            new[key] = _mapped(branch, change, key)
        return new
    if isinstance(tree, list | tuple):
        return type(tree)([_mapped(branch, change) for branch in tree])
    return tree
