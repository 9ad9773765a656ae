"""What a model takes, for a plain loop: a loader's batches, normalised and erased on the model's device."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fat_train.augment.device import erase, to_input
from fat_train.data.loader import Loader
from fat_train.threads import torch_threads
from fat_train.types import Batch

NOISE_TAG = 0x4E4F4953  # keeps the noise's random stream apart from any other that is seeded by (seed, epoch, step)


class InputLoader:
    """An iterable over `(images, targets)`: float32 pictures in channels-last memory, and class numbers.

    The position, and what may be done with it, are the `Loader`'s underneath. The noise of erased rectangles follows
    from seed, epoch, batch and rank, and leaves torch's own generators alone.

    Args:
        loader: what reads the files.
        mean: of each channel of RGB in [0, 1].
        std: of each channel, likewise.
        device: where the model is.
    """

    def __init__(self, loader: Loader, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.loader = loader
        self.mean, self.std = tuple(mean), tuple(std)
        self.device = device
        self._noise = torch.Generator(device)
        self._memory = _Memory()
        # On a CPU one thread does it: torch's would wait for each other while the loader's threads have the cores.
        self._thread = torch_threads(1) if device.type == "cpu" else None
        if self._thread is not None:
            weakref.finalize(self, self._thread.shutdown, wait=False)

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """See `Loader.set_epoch`."""
        self.loader.set_epoch(epoch)

    def state_dict(self) -> dict[str, int]:
        """See `Loader.state_dict`."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """See `Loader.load_state_dict`."""
        self.loader.load_state_dict(state)

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "B C H W"], Int[Tensor, " B"]]]:
        for batch in self.loader:
            state = self.loader.state_dict()
            if self._thread is None:
                yield self._prepare(batch, state["epoch"], state["batch"])
            else:
                yield self._thread.submit(self._prepare, batch, state["epoch"], state["batch"]).result()

    def _prepare(self, batch: Batch, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        pixels, targets, _, boxes = (part.to(self.device, non_blocking=True) for part in batch)
        out = self._memory.take(pixels.shape) if self.device.type == "cpu" else None
        images = to_input(pixels, self.mean, self.std, out)
        augment = self.loader.augment
        if augment is not None and augment.erase_prob > 0:
            order = self.loader.order
            rng = np.random.default_rng([order.seed, epoch, number, order.rank, NOISE_TAG])
            self._noise.manual_seed(int(rng.integers(2**63 - 1)))
            images = erase(images, boxes, augment.erase_mode, self._noise)
        return images, targets


class _Memory:
    """Float32 batches in main memory that are used again once nobody refers to them.

    Fresh memory for each would cost more than filling it: the system hands it out zeroed, page by page.
    """

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []

    def take(self, shape: Sequence[int]) -> Float[Tensor, "B H W C"]:
        """Give a batch of this shape, of any content. Every view of it keeps it from being given again."""
        size = math.prod(shape)
        for number in range(len(self._blocks)):
            if sys.getrefcount(self._blocks[number]) == _UNUSED and self._blocks[number].size == size:
                return torch.from_numpy(self._blocks[number]).view(*shape)
        self._blocks = [block for block in self._blocks if block.size == size]  # another size of batch has begun
        self._blocks.append(np.empty(size, np.float32))
        return torch.from_numpy(self._blocks[-1]).view(*shape)


_PROBE = [np.empty(1)]
_UNUSED = sys.getrefcount(_PROBE[0])
"""The references that CPython counts where the list's is the only one."""
