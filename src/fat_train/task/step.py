"""What the trainer asks of a task: a second task adds a file beside `classification.py` and changes none."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from torch import nn
from torchmetrics import Metric

from fat_train.types import Batch, StepOutput


class StepKey(NamedTuple):
    """Where in the run a batch stands: all randomness of its step follows from this, so a resumed run needs no saved
    random state and repeats the unbroken one."""

    seed: int
    update: int
    micro_batch: int
    rank: int

    def rng(self, stream: int) -> np.random.Generator:
        """The generator for one use (`stream`) in this step."""
        return np.random.default_rng([*self, stream])

    def torch_seed(self) -> int:
        """A seed for torch's own generators (drop path, noise) in this step."""
        return int(self.rng(stream=0).integers(2**63 - 1))


class Task(Protocol):
    """A model with its loss, and what to compute from a batch. It moves no data and takes no optimiser step."""

    model: nn.Module

    def train_step(self, batch: Batch, key: StepKey) -> StepOutput:
        """One training batch, with gradients."""
        ...

    def eval_step(self, batch: Batch, model: nn.Module | None = None) -> StepOutput:
        """One validation batch; `model` takes the place of the task's own (its moving average, say)."""
        ...

    def new_metric(self) -> Metric:
        """A fresh metric: `update(logits, targets)`, `compute() -> dict[name, value]`."""
        ...
