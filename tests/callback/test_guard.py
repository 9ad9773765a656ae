"""Settings of the guards that mean nothing are refused by name."""

from __future__ import annotations

import pytest

from fat_train.callback.guard import GuardConfig
from fat_train.types import UserError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_skipped": -1}, "callback.guard.max_skipped must not be negative; got -1"),
        ({"spike_sigma": -0.5}, "callback.guard.spike_sigma must not be negative; got -0.5"),
        ({"spike_window": 1}, "callback.guard.spike_window must be at least 2 updates; got 1"),
        ({"hang_minutes": -1.0}, "callback.guard.hang_minutes must not be negative; got -1.0"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        GuardConfig(**settings)
