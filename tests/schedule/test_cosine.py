"""The learning rate at each update is the one that FAT's released code, or Swin's, runs through."""

from __future__ import annotations

import pytest
import torch

from fat_train.schedule.cosine import CosineConfig
from fat_train.types import UserError

STEPS_PER_EPOCH = 1251
TOTAL, WARMUP = 300 * STEPS_PER_EPOCH, 20 * STEPS_PER_EPOCH


def rates(config: CosineConfig, steps: list[int]) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = config.build(optimizer, total_steps=TOTAL, warmup_steps=WARMUP, warmup_lr=1e-6, min_lr=1e-5)
    found = [optimizer.param_groups[0]["lr"]] if 0 in steps else []
    for step in (step for step in steps if step):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_default_schedule_gives_the_numbers_of_fats_released_code() -> None:
    got = rates(CosineConfig(), [0, 12_510, 25_019, 25_020, 187_650, 375_299])
    assert got == pytest.approx([1.000e-6, 5.005e-4, 9.9996e-4, 9.89183e-4, 5.05000e-4, 1.0e-5], rel=1e-5)


def test_warmup_prefix_gives_swins_numbers() -> None:
    got = rates(CosineConfig(warmup_prefix=True), [0, 12_510, 25_019, 25_020, 187_650, 375_299])
    assert got == pytest.approx([1.000e-6, 5.005e-4, 9.9996e-4, 1.0e-3, 5.60422e-4, 1.0e-5], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"epochs": 0}, "schedule.epochs"),
        ({"epochs": 10, "warmup_epochs": 10}, "schedule.warmup_epochs"),
        ({"min_lr": -1.0}, "schedule.min_lr"),
    ],
)
def test_impossible_schedules_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        CosineConfig(**settings)
