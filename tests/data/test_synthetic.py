from __future__ import annotations

import numpy as np
import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.datamodule import SyntheticDataConfig, build_loader, open_data
from fat_train.data.loader import Loader

CONFIG = SyntheticDataConfig(num_images=60, num_val_images=25, num_classes=7, image_px=48, eval_resize_px=48)


def loader(split: str = "train", **kwargs: int) -> Loader:
    source = open_data(CONFIG)
    index = source.train if split == "train" else source.val
    return build_loader(CONFIG, index, split, AugmentConfig(), batch_per_device=6, **kwargs)


def test_synthetic_images_need_no_disk_and_keep_the_order_of_any_set() -> None:
    train = loader()
    batches = list(train)
    assert len(batches) == len(train) == 10
    assert sorted(int(row) for batch in batches for row in batch.indices) == list(range(60))
    assert all(batch.images.shape == (6, 48, 48, 3) and batch.images.dtype == torch.uint8 for batch in batches)
    assert sum(len(batch.targets) for rank in range(4) for batch in loader("val", rank=rank, world_size=4)) == 25


def test_an_image_is_the_same_in_every_epoch_and_on_every_rank() -> None:
    def pictures(source: Loader) -> dict[int, torch.Tensor]:
        return {int(row): picture for batch in source for row, picture in zip(batch.indices, batch.images, strict=True)}

    first, train = pictures(loader()), loader()
    train.set_epoch(1)
    other_epoch, other_rank = pictures(train), pictures(loader(rank=1, world_size=2))
    assert all(torch.equal(first[row], picture) for row, picture in (other_epoch | other_rank).items())


def test_pictures_tell_their_class() -> None:
    batches = list(loader())
    images = torch.cat([batch.images for batch in batches]).float().numpy()
    targets = torch.cat([batch.targets for batch in batches]).numpy()
    centres = np.stack([images[targets == label].mean(axis=0) for label in range(7)])
    nearest = ((images[:, None] - centres) ** 2).mean(axis=(2, 3, 4)).argmin(axis=1)
    np.testing.assert_array_equal(nearest, targets)
