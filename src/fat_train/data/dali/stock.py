"""DALI as its own examples use it, with its file reader, random operators and RandAugment: to measure ours against.

Nothing trains with it: its RandAugment is another distribution than timm's, and its position cannot be restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.auto_aug import rand_augment
from nvidia.dali.data_node import DataNode
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIClassificationIterator
from torch import Tensor

from fat_train.augment.policy import AugmentConfig, RandAugment
from fat_train.data.dali.op import INTERPOLATION
from fat_train.data.picture import PictureSpec

READER = "reader"
LEVELS = 31
LEVELS_A_TIMM_LEVEL = 3


class StockLoader:
    """An iterable over `(images, targets)`, float32 [B, 3, H, W] on the CPU.

    Args:
        samples: file and class of each image.
        augment: the recipe, as near as DALI's own operators come; None resizes and cuts the centre out.
        spec: sizes, interpolation and fill.
        mean: of each channel of RGB in [0, 1].
        std: of each channel, likewise.
        batch_size: images of a batch.
        num_threads: CPU threads.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str, int]],
        augment: AugmentConfig | None,
        spec: PictureSpec,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        batch_size: int,
        num_threads: int,
    ) -> None:
        self.files = [file for file, _ in samples]
        # Its RandAugment calls operators that it says are deprecated, and insists: they are caught, not filtered.
        with warnings.catch_warnings(record=True):
            pipeline = _graph(
                self.files,
                [target for _, target in samples],
                augment,
                spec,
                [255 * value for value in mean],
                [255 * value for value in std],
                batch_size=batch_size,
                num_threads=num_threads,
                device_id=None,
            )
            pipeline.build()
        policy = LastBatchPolicy.PARTIAL if augment is None else LastBatchPolicy.DROP
        self._iterator = DALIClassificationIterator(
            pipeline, reader_name=READER, auto_reset=True, last_batch_policy=policy
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (batch,) in self._iterator:
            yield batch["data"], batch["label"]


@pipeline_def(enable_conditionals=True)
def _graph(
    files: list[str],
    targets: list[int],
    augment: AugmentConfig | None,
    spec: PictureSpec,
    mean: list[float],
    std: list[float],
) -> tuple[DataNode, DataNode]:
    encoded, target = fn.readers.file(
        name=READER, files=files, labels=targets, random_shuffle=augment is not None, pad_last_batch=augment is None
    )
    square = (spec.image_px, spec.image_px)
    kernel = {"interp_type": INTERPOLATION[spec.interpolation], "antialias": True}
    normal = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": mean, "std": std}
    if augment is None:
        images = fn.decoders.image(encoded, output_type=types.RGB)
        images = fn.resize(images, resize_shorter=spec.eval_resize_px, **kernel)
        return fn.crop_mirror_normalize(images, crop=square, **normal), target
    images = fn.decoders.image_random_crop(
        encoded, output_type=types.RGB, random_area=augment.crop_scale, random_aspect_ratio=augment.crop_ratio
    )
    images = fn.resize(images, size=square, **kernel)
    asked = augment.policy
    if isinstance(asked, RandAugment):
        level = min(LEVELS - 1, asked.magnitude * LEVELS_A_TIMM_LEVEL)
        images = rand_augment.rand_augment(
            images, n=asked.num_ops, m=level, num_magnitude_bins=LEVELS, shape=square, fill_value=spec.fill[1]
        )
    mirror = fn.random.coin_flip(probability=augment.hflip_prob)
    images = fn.crop_mirror_normalize(images, mirror=mirror, **normal)
    return _erased(images, augment) if augment.erase_prob else images, target


def _erased(images: DataNode, augment: AugmentConfig) -> DataNode:
    """One rectangle of zeros, which are the mean: DALI's `erase` knows no noise."""
    area = fn.random.uniform(range=augment.erase_area) * fn.random.coin_flip(probability=augment.erase_prob)
    ratio = fn.random.uniform(range=(augment.erase_ratio, 1 / augment.erase_ratio))
    size = fn.stack(math.min(math.sqrt(area * ratio), 1.0), math.min(math.sqrt(area / ratio), 1.0))
    anchor = fn.random.uniform(range=(0.0, 1.0), shape=2) * (1.0 - size)
    return fn.erase(images, anchor=anchor, shape=size, axis_names="HW", normalized=True, fill_value=0)
