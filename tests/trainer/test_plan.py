"""The global batch stays the recipe's, whatever the machine; rates scale with it."""

from __future__ import annotations

import pytest

from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.trainer.build import TrainerConfig
from fat_train.trainer.plan import RunPlan, plan_run
from fat_train.types import UserError

IMAGENET = 1_281_167


def plan(images: int = IMAGENET, **settings: int) -> RunPlan:
    return plan_run(TrainerConfig(**settings), AdamWConfig(), CosineConfig(), train_images=images)


@pytest.mark.parametrize(
    ("settings", "per_device", "accumulate"),
    [
        ({"devices": 8}, 128, 1),
        ({"devices": 1}, 128, 8),
        ({"devices": 4, "num_nodes": 4}, 64, 1),
        ({"devices": 2, "max_batch_per_device": 200}, 128, 4),
        ({"devices": 8, "max_batch_per_device": 100}, 64, 2),
        ({"devices": 1, "max_batch_per_device": 1024}, 1024, 1),
    ],
)
def test_the_global_batch_is_kept_by_accumulation(settings: dict, per_device: int, accumulate: int) -> None:
    run = plan(**settings)
    assert (run.batch_per_device, run.accumulate, run.global_batch) == (per_device, accumulate, 1024)
    assert run.batch_per_device * run.accumulate * run.world_size == 1024


def test_imagenets_300_epochs_are_375300_updates_at_the_papers_rates() -> None:
    run = plan(devices=8)
    assert (run.steps_per_epoch, run.total_steps, run.warmup_steps) == (1251, 375_300, 25_020)
    assert (run.lr, run.warmup_lr, run.min_lr) == pytest.approx((1e-3, 1e-6, 1e-5))


def test_each_derived_number_is_printed_with_its_formula() -> None:
    lines = "\n".join(plan(devices=8).lines())
    assert "1024 = 128 images x 8 devices x 1 accumulated" in lines
    assert "375300 = 300 epochs x 1251 (1281167 images // 1024, the rest waits" in lines
    assert "1.000e-06 -> 1.000e-03 in 25020 updates -> 1.000e-05 (0.0005 x 1024 / 512, the others alike)" in lines
    short = plan_run(TrainerConfig(), AdamWConfig(), CosineConfig(), train_images=IMAGENET, max_steps_per_epoch=3)
    assert "900 = 300 epochs x 3 (1281167 images // 1024, cut short by debug.max_steps_per_epoch)" in "\n".join(
        short.lines()
    )


@pytest.mark.parametrize(
    ("images", "settings", "said"),
    [
        (202, {}, r"trainer\.global_batch=1024 is more than the 202 images .*; give trainer\.global_batch=202 or less"),
        (IMAGENET, {"global_batch": 1021}, r"micro-batches of 1 images, .* such as 896"),
        (IMAGENET, {"devices": 3}, r"trainer\.global_batch=1024 does not divide over 3 devices .* 1023 and 1026"),
    ],
)
def test_an_impossible_split_is_refused_with_what_would_do(images: int, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan(images, **settings)


def test_repeats_leave_the_updates_alone_and_are_said() -> None:
    run = plan_run(TrainerConfig(devices=8), AdamWConfig(), CosineConfig(), train_images=IMAGENET, repeats=3)
    assert run.total_steps == plan(devices=8).total_steps
    assert "repeats        427008 images an epoch, each 3 times, augmented each time" in run.lines()
    assert not any("repeats" in line for line in plan(devices=8).lines())


def test_more_repeats_than_a_global_batch_holds_are_refused_before_anything_starts() -> None:
    with pytest.raises(
        UserError, match=r"augment\.repeats must be at least 1 and at most trainer\.global_batch=8.*got 9"
    ):
        plan_run(TrainerConfig(global_batch=8), AdamWConfig(), CosineConfig(), train_images=100, repeats=9)
