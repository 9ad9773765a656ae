"""Cross entropy with label smoothing against one class or a mixture of two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fat_train.types import Labels, UserError


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """Softmax cross entropy (Szegedy et al., 2016, for the smoothing)."""

    label_smoothing: float = 0.1
    """Share of each target that is spread evenly over all classes."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing must be in [0, 1); got {self.label_smoothing}")

    def build(self) -> CrossEntropy:
        """The loss as a callable."""
        return CrossEntropy(self.label_smoothing)


class CrossEntropy:
    """λ·CE(z, a) + (1 − λ)·CE(z, b): equal to CE against the mixed soft target, without ever building it.

    CE is linear in its target, so smoothing each of the two one-hot targets first is smoothing their mixture.
    """

    def __init__(self, label_smoothing: float) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Float[Tensor, "B K"], labels: Labels) -> Float[Tensor, ""]:
        """Mean over the batch, in float32 whatever the autocast type."""
        logits = logits.float()
        if isinstance(labels.weight, Tensor):
            first, second = (
                F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction="none")
                for targets in (labels.first, labels.second)
            )
            return torch.lerp(second, first, labels.weight).mean()
        loss = F.cross_entropy(logits, labels.first, label_smoothing=self.label_smoothing)
        if labels.weight < 1:
            other = F.cross_entropy(logits, labels.second, label_smoothing=self.label_smoothing)
            loss = labels.weight * loss + (1 - labels.weight) * other
        return loss
