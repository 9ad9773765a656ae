"""A training loader starts where the run is, however the run got there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.datamodule import SyntheticDataConfig, build_loader, open_data
from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.trainer.build import TrainerConfig
from fat_train.trainer.loaders import AtRunPosition
from fat_train.trainer.plan import plan_run

DATA = SyntheticDataConfig(num_images=26, num_val_images=4, num_classes=2, image_px=8, eval_resize_px=8)


def loader_at(update: int) -> AtRunPosition:
    """Global batch 8 in two micro-batches of 4: three updates an epoch."""
    source = open_data(DATA)
    trainer = TrainerConfig(global_batch=8, max_batch_per_device=4)
    plan = plan_run(trainer, AdamWConfig(), CosineConfig(epochs=2, warmup_epochs=0), train_images=len(source.train))
    loader = build_loader(DATA, source.train, "train", AugmentConfig(), batch_per_device=4, accumulate=2, seed=5)
    return AtRunPosition(loader, SimpleNamespace(global_step=update), plan)


def seen(loader: AtRunPosition) -> list[list[int]]:
    return [batch.indices.tolist() for batch in loader]


@pytest.mark.parametrize("update", range(6))
def test_after_any_number_of_updates_the_rest_of_the_epoch_follows(update: int) -> None:
    epochs = [seen(loader_at(0)), seen(loader_at(3))]
    assert epochs[0] != epochs[1]
    epoch, step = divmod(update, 3)
    assert seen(loader_at(update)) == epochs[epoch][2 * step :]


def test_the_place_is_looked_up_when_the_first_batch_is_asked_for() -> None:
    """Lightning makes the iterator before it restores its counters."""
    loader = loader_at(0)
    iterator = iter(loader)
    loader.trainer.global_step = 4
    assert torch.equal(next(iterator).indices, torch.tensor(seen(loader_at(4))[0]))
    assert loader.state_dict() == {"epoch": 1, "batch": 3}
