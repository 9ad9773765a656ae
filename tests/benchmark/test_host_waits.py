"""Who asks a device for a value is named by file and line."""

from __future__ import annotations

import inspect

import pytest
import torch

from fat_train.augment.device import erase
from fat_train.benchmark.host_waits import HostReads, SyncWatch, Waits


def _line_of(function, text: str) -> int:
    lines, first = inspect.getsourcelines(function)
    return first + next(number for number, line in enumerate(lines) if text in line)


def _asks(values: torch.Tensor) -> None:
    if values.sum() > 0:
        values.max().item()
    values.nonzero()


def test_every_value_that_is_asked_for_counts_at_its_line() -> None:
    waits = Waits()
    with HostReads(waits):
        _asks(torch.ones(3))
        torch.ones(3).add_(1).mean()
    lines = [_line_of(_asks, text) for text in ("values.sum()", "item()", "nonzero()")]
    assert {place.rpartition(":")[::2] for place in waits.in_step} == {
        ("test_host_waits.py", str(line)) for line in lines
    }
    assert set(waits.in_step.values()) == {1}


def test_arithmetic_on_a_device_asks_for_nothing() -> None:
    waits = Waits()
    with HostReads(waits):
        erase(torch.rand(2, 3, 8, 8), torch.zeros((2, 1, 4), dtype=torch.int64), "const")
    assert not waits.in_step


@pytest.mark.gpu
def test_a_gpu_that_is_waited_for_is_noticed_and_kernels_are_not() -> None:
    waits, part = Waits(), "forward"
    values = torch.ones(3, device="cuda")
    with SyncWatch(waits, lambda: part) as watch:
        values.add_(1).mean()
        values.max().item()
        part = "data"
        values.nonzero()
        watch.is_silent = True
        values.max().item()
    assert sum(waits.in_step.values()) == 1
    assert sum(waits.in_loader.values()) == 1
    (place,) = waits.in_step
    assert place.startswith("test_host_waits.py:")
    assert torch.cuda.get_sync_debug_mode() == 0
