from __future__ import annotations

import json
import math

import pytest
import torch

from fat_train.callback.epoch_meter import EpochMeter, Reading

CPU = torch.device("cpu")


def add_updates(meter: EpochMeter, losses: list[float]) -> None:
    for loss in losses:
        meter.add(torch.tensor(loss), ends_update=True)


def test_the_mean_is_summed_in_float64() -> None:
    meter = EpochMeter()
    add_updates(meter, [1e8, 1.0, 1.0, 1.0, 1.0])  # float32 would lose every 1.0
    assert meter.mean_loss(CPU) == (1e8 + 4) / 5


def test_micro_batches_make_one_update() -> None:
    meter = EpochMeter()
    meter.add(torch.tensor(1.0), ends_update=False)
    meter.add(torch.tensor(2.0), ends_update=True)
    assert meter.updates == 1
    assert meter.mean_loss(CPU) == 3.0


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean_also_after_a_restart() -> None:
    meter, again = EpochMeter(), EpochMeter()
    for share in (1.0, 2.0, float("nan"), float("inf"), 3.0, 2.0):
        meter.add(torch.tensor(share), ends_update=meter._batches % 2 == 1)
    assert meter.updates == 3
    assert meter.mean_loss(CPU) == (3.0 + 5.0) / 2
    again.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    for each in (meter, again):
        add_updates(each, [6.0])
    assert again.mean_loss(CPU) == meter.mean_loss(CPU)
    add_updates(fresh := EpochMeter(), [float("nan")])
    assert math.isnan(fresh.mean_loss(CPU))


def test_validation_counts_for_the_epoch_and_not_for_the_training() -> None:
    now = 0.0
    meter = EpochMeter(clock=lambda: now)
    now = 10.0
    meter.pause()
    now = 14.0
    assert (meter.elapsed_s, meter.train_s) == (14.0, 10.0)
    meter.unpause()
    now = 15.0
    assert (meter.elapsed_s, meter.train_s) == (15.0, 11.0)


def test_a_restored_epoch_goes_on_to_the_bit_and_without_the_time_in_between() -> None:
    now = 0.0
    losses = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()
    whole, first, second = EpochMeter(lambda: now), EpochMeter(lambda: now), EpochMeter(lambda: now)
    for meter in (whole, first):
        meter.reset(epoch=3)
    add_updates(whole, losses)
    add_updates(first, losses[:11])
    now = 60.0
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    now = 1000.0
    second.take_up(epoch=3)
    assert second.state_dict() == first.state_dict() | {"elapsed_s": 60.0}
    add_updates(second, losses[11:])
    now = 1005.0
    assert second.mean_loss(CPU) == whole.mean_loss(CPU)
    assert second.elapsed_s == 65.0


def test_a_restored_epoch_that_is_over_leaves_nothing_in_the_next() -> None:
    meter = EpochMeter()
    add_updates(meter, [5.0])
    restored = EpochMeter()
    restored.load_state_dict(meter.state_dict())
    restored.take_up(epoch=1)
    add_updates(restored, [1.0])
    assert (restored.updates, restored.mean_loss(CPU)) == (1, 1.0)


def test_another_number_of_ranks_takes_the_mean_sum() -> None:
    meter = EpochMeter()
    meter.load_state_dict(
        {"epoch": 0, "updates": 2, "loss_sum_of_ranks": [3.0, 11.0], "elapsed_s": 1.0, "paused_s": 0.0}
    )
    assert meter.mean_loss(CPU) == 3.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_is_not_waited_for() -> None:
    meter = EpochMeter()
    loss = torch.ones((), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            meter.add(loss, ends_update=True)
            reading = Reading(meter.loss_sum(loss.device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reading.value() == 3.0
    assert reading.is_here
