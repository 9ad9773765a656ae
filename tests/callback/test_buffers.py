"""BatchNorm's statistics go back to what they were before an update."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fat_train.callback.buffers import BuffersBefore


@pytest.mark.parametrize("known", [True, False], ids=["known to the host", "known to the device alone"])
@pytest.mark.parametrize("bad", [0.0, 1.0])
def test_statistics_and_counts_are_put_back_where_the_update_is_bad(known: bool, bad: float) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6))
    model(torch.randn(2, 3, 8, 8))
    buffers = BuffersBefore(model)
    buffers.keep()
    before = {name: value.clone() for name, value in model.named_buffers()}
    model(torch.full((2, 3, 8, 8), float("nan") if bad else 1.0))
    after = {name: value.clone() for name, value in model.named_buffers()}
    assert after["1.num_batches_tracked"] == 2
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])
    if not known:
        buffers.put_back_where(torch.tensor(bad))
    elif bad:
        buffers.put_back()
    expected = before if bad else after
    for name, value in model.named_buffers():
        assert torch.equal(value, expected[name])
        assert torch.equal(buffers.kept()[name], before[name])


def test_a_model_without_buffers_is_no_special_case() -> None:
    buffers = BuffersBefore(nn.Linear(2, 2))
    buffers.keep()
    buffers.put_back_where(torch.tensor(1.0))
    assert buffers.kept() == {}
