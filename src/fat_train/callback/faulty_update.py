"""The file that holds an update whose loss or gradient was not finite: all that is needed to compute it again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fat_train.checkpoint.io import replacing
from fat_train.types import Batch, UserError

PATTERN = "nonfinite_update_*.pt"
KEY = ("seed", "update", "micro_batch", "rank")


@dataclass(frozen=True, kw_only=True)
class FaultyUpdate:
    """One rank's part of one update.

    It is kept as plain values and tensors, so that reading it runs no code. `update` counts from 1, as `step` in
    metrics.csv does; the `update` in a key counts the updates before it.
    """

    update: int
    rank: int
    world_size: int
    batches: list[dict[str, Tensor]]
    """The micro-batches as the loader gave them, by the names of `Batch`."""
    keys: list[dict[str, int]]
    """Where in the run each of them stands, by the names of `StepKey`."""
    losses: list[float]
    """The loss of each of them, as the run computed it."""
    state_dict: dict[str, Tensor]
    """The model's weights and buffers before the update."""
    gradient_norm: float
    gradient_norms: dict[str, float]
    """By layer group, before clipping."""
    rate: float
    fat_train: dict[str, Any]
    """Configuration, versions and data of the run, as in its checkpoints."""

    def save(self, folder: Path) -> Path:
        """Write `nonfinite_update_<update>_rank<rank>.pt`; returns its path.

        Raises:
            OSError: the disk refuses it.
            RuntimeError: so does torch's writer, which hides a full disk in one.
        """
        path = folder / f"nonfinite_update_{self.update}_rank{self.rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(asdict(self), file)
        return path

    @classmethod
    def of(cls, content: Mapping[str, Any], *, source: str) -> FaultyUpdate:
        """The update that the content of a file describes.

        Raises:
            UserError: it is another kind of file.
        """
        fields = cls.__dataclass_fields__.keys()
        if content.keys() != fields:
            raise UserError(f"{source} holds no update: give a {PATTERN} that a run left in its folder when it stopped")
        return cls(**content)

    def batch(self, number: int) -> Batch:
        """One of the micro-batches, on the CPU."""
        return Batch(**self.batches[number])


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Euclidean norm of the gradients of each top-level part ("patch_embed", "layers.0", …, "head")."""
    norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters() if p.grad is not None}
    return by_layer_group(norms.items())


def by_layer_group(norms: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The norms of parameters, by their names, as one for each top-level part."""
    squares: dict[str, float] = defaultdict(float)
    for name, norm in norms:
        first, second, *_ = f"{name}.".split(".")
        squares[f"{first}.{second}" if second.isdigit() else first] += norm * norm
    return {group: square**0.5 for group, square in squares.items()}


def norm_table(norms: Mapping[str, float]) -> str:
    """A line for each layer group."""
    return "\n".join(f"  {group:<14}{norm:.4g}" for group, norm in norms.items())
