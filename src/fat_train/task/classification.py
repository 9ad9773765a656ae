"""Image classification: normalise, erase, mix, forward, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

from fat_train.augment.device import erase, to_input
from fat_train.augment.mix import draw_mix, mix
from fat_train.augment.policy import AugmentConfig
from fat_train.metric.topk import TopK
from fat_train.task.step import StepKey
from fat_train.types import Batch, Labels, StepOutput

MIX_STREAM = 1


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """One label an image, top-1 and top-5."""

    def build(
        self,
        model: nn.Module,
        loss: Callable[[Float[Tensor, "B K"], Labels], Float[Tensor, ""]],
        augment: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> Classification:
        """The task over a model; `mean` and `std` are of pixels in [0, 1]."""
        return Classification(model, loss, augment, mean, std)


class Classification:
    """The training and the validation step of the DeiT/Swin/FAT recipe."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Float[Tensor, "B K"], Labels], Float[Tensor, ""]],
        augment: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.model = model
        self.loss = loss
        self.augment = augment
        self.mean, self.std = tuple(mean), tuple(std)

    def prepare(self, batch: Batch, key: StepKey) -> tuple[Float[Tensor, "B C H W"], Labels]:
        """The model's input in training. Erasing comes before mixing, as in DeiT, Swin and FAT (timm's own loader
        erases the mixture)."""
        images = to_input(batch.images, self.mean, self.std)
        images = erase(images, batch.erase, self.augment.erase_mode)
        number, _, height, width = images.shape
        drawn = draw_mix(self.augment, key.rng(MIX_STREAM), number, height, width)
        return mix(images, batch.targets, drawn)

    def train_step(self, batch: Batch, key: StepKey) -> StepOutput:
        """Forward and loss of one augmented batch."""
        images, labels = self.prepare(batch, key)
        logits = self.model(images)
        return StepOutput(loss=self.loss(logits, labels), logits=logits, targets=batch.targets)

    def eval_step(self, batch: Batch, model: nn.Module | None = None) -> StepOutput:
        """Forward and plain cross entropy (no smoothing, so that it compares across recipes)."""
        logits = (model or self.model)(to_input(batch.images, self.mean, self.std)).float()
        return StepOutput(loss=F.cross_entropy(logits, batch.targets), logits=logits, targets=batch.targets)

    def new_metric(self) -> Metric:
        """Top-1 and top-5 counts."""
        return TopK()
