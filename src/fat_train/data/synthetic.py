"""Images out of nothing: no disk, no decoding, but order, shards, epochs and resume as in any other set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.index import FileIndex
from fat_train.data.loader import Loader, Planned
from fat_train.data.order import Order
from fat_train.types import Batch

NOISE_IMAGES = 32
NOISE_LEVELS = 64
STRIPE_LEVELS = 96


def synthetic_index(num_images: int, num_classes: int, split: str) -> FileIndex:
    """Name images that exist nowhere; class c has the rows c, c + num_classes, …"""
    rows = np.arange(num_images)
    classes = tuple(f"class_{number:05d}" for number in range(num_classes))
    targets = rows % num_classes
    paths = tuple(f"{classes[target]}/{row:08d}" for row, target in zip(rows, targets, strict=True))
    return FileIndex(Path("synthetic") / split, paths, targets, classes)


class SyntheticLoader(Loader):
    """Stripes whose colour and spacing tell the class, under noise that tells the image.

    A picture is a function of seed, class and row alone. Of the augmentation only the erased rectangles are drawn:
    the pictures stand for the ones that a pipeline has already cropped.
    """

    def __init__(self, index: FileIndex, order: Order, augment: AugmentConfig | None, image_px: int) -> None:
        super().__init__(index, order, augment, image_px)
        rng = np.random.default_rng(order.seed)
        classes, px = len(index.classes), image_px
        self._noise = rng.integers(NOISE_LEVELS, size=(NOISE_IMAGES, px, px, 3), dtype=np.uint8)
        self._colour = rng.integers(256 - NOISE_LEVELS - STRIPE_LEVELS, size=(classes, 1, 1, 3), dtype=np.uint8)
        cycles = rng.uniform(1, px / 2, size=(classes, 1))
        phase = rng.uniform(0, 2 * np.pi, size=(classes, 1))
        wave = np.sin(2 * np.pi * np.arange(px) * cycles / px + phase)
        self._stripes = np.rint((wave + 1) / 2 * STRIPE_LEVELS).astype(np.uint8)[:, None, :, None]  # [K, 1, px, 1]

    def _load(self, planned: Iterator[Planned]) -> Iterator[Batch]:
        for plan in planned:
            rows = plan.plan.indices
            targets = self.index.targets[rows]
            images = self._noise[rows % NOISE_IMAGES]
            images += self._colour[targets] + self._stripes[targets]
            yield self._batch_of(plan, torch.from_numpy(images))
