"""Counts are exact, however the images are cut into batches."""

from __future__ import annotations

import pytest
import torch

from fat_train.metric.topk import TopK


def counted(logits: torch.Tensor, targets: torch.Tensor, batch: int) -> dict[str, float]:
    metric = TopK()
    for part, wanted in zip(logits.split(batch), targets.split(batch), strict=True):
        metric.update(part, wanted)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_result_does_not_depend_on_the_batch_size(batch: int) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 20), torch.randint(20, (50,))
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    got = counted(logits, targets, batch)
    assert got["count"] == 50
    assert got["top1"] == pytest.approx(100 * (ranks < 1).sum().item() / 50)
    assert got["top5"] == pytest.approx(100 * (ranks < 5).sum().item() / 50)


def test_with_fewer_than_five_classes_top5_counts_everything() -> None:
    assert counted(torch.randn(9, 3), torch.zeros(9, dtype=torch.long), 4)["top5"] == 100
