from __future__ import annotations

import pytest
import torch

from fat_train.callback.epoch_meter import Reading
from fat_train.callback.pace import Pace


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class LateReading(Reading):
    """A number that is still on its way from the device."""

    @property
    def is_here(self) -> bool:
        return False


def reading(value: float) -> Reading:
    return Reading(torch.tensor(value, dtype=torch.float64))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pace(clock: Clock) -> Pace:
    return Pace(clock)


def test_nothing_is_claimed_before_two_marks(pace: Pace) -> None:
    pace.mark(0, reading(0))
    assert pace.updates_per_s is None
    assert pace.loss is None
    assert pace.remaining_s(10, epoch_ends=1) is None


def test_rate_and_loss_are_those_of_the_last_half_minute(pace: Pace, clock: Clock) -> None:
    updates, loss_sum = 0, 0.0
    for second in range(200):
        clock.now = 100.0 + second
        pace.mark(updates, reading(loss_sum))
        updates_per_s, loss = (1, 5.0) if second < 100 else (4, 2.0)
        updates += updates_per_s
        loss_sum += updates_per_s * loss
    assert pace.updates_per_s == pytest.approx(4)
    assert pace.loss == pytest.approx(2)


def test_the_estimate_has_every_validation_that_is_still_to_come(pace: Pace, clock: Clock) -> None:
    pace.mark(0, reading(0))
    clock.now += 10
    pace.mark(5, reading(1))  # 0.5 updates a second
    pace.begin_break()
    assert pace.remaining_s(20, epoch_ends=4) == pytest.approx(40)  # a break's length is not known yet
    clock.now += 7
    pace.mark(0, reading(0))
    assert pace.remaining_s(20, epoch_ends=4) == pytest.approx(40 + 4 * 7)


def test_a_break_does_not_slow_the_rate(pace: Pace, clock: Clock) -> None:
    pace.mark(0, reading(0))
    clock.now += 1
    pace.mark(2, reading(1))
    pace.begin_break()
    clock.now += 1000
    pace.mark(0, reading(0))
    clock.now += 1
    pace.mark(2, reading(1))
    assert pace.updates_per_s == pytest.approx(2)


def test_a_loss_that_has_not_arrived_is_not_waited_for(pace: Pace, clock: Clock) -> None:
    pace.mark(0, reading(0))
    clock.now += 1
    pace.mark(2, reading(3))
    clock.now += 1
    pace.mark(4, LateReading(torch.tensor(100.0)))
    assert pace.loss == pytest.approx(1.5)
    assert pace.updates_per_s == pytest.approx(2)
