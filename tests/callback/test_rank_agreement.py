"""Ranks learn the largest wish of all of them, each at the same call, and the mean of all their losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

from fat_train.callback.agreement import Agreement, Wish
from fat_train.callback.epoch_meter import EpochMeter, mean_over_ranks

CPU = torch.device("cpu")
WISHES = {0: [0, 0, 1, 0, 0], 1: [0, 2, 0, 0, 0]}
LOSSES = {0: [1.0, 2.0], 1: [5.0, 6.0]}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has found out."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, (str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def _rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {**_wishes(rank), **_losses(rank)}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _wishes(rank: int) -> dict[str, Any]:
    agreement = Agreement()
    agreement.start(world_size=2)
    return {
        "agreed": [int(agreement.exchange(Wish(wish))) for wish in WISHES[rank]],
        "settled": int(agreement.settle(Wish.SAVE if rank else Wish.NOTHING)),
        "smallest": agreement.smallest(3 + rank),
    }


def _losses(rank: int) -> dict[str, Any]:
    meter, restored = EpochMeter(), EpochMeter()
    for loss in LOSSES[rank]:
        meter.add(torch.tensor(loss), ends_update=True)
    state = meter.state_dict()
    restored.load_state_dict(state)
    restored.add(torch.tensor(0.0), ends_update=True)
    return {
        "sums": state["loss_sum_of_ranks"],
        "means": [meter.mean_loss(CPU), restored.mean_loss(CPU), mean_over_ranks(torch.tensor(float(rank))).item()],
    }


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = Agreement()
    agreement.start(world_size=1)
    assert [agreement.exchange(wish) for wish in Wish] == list(Wish)
    assert agreement.settle(Wish.LEAVE) == Wish.LEAVE
    assert agreement.smallest(7) == 7


def test_two_ranks_learn_each_wish_a_call_later_and_at_a_settling_at_once(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["agreed"] == [0, 0, 2, 1, 0]
        assert found["settled"] == int(Wish.SAVE)
        assert found["smallest"] == 3


def test_ranks_agree_on_the_mean_loss_and_each_keeps_its_own_sum(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["sums"] == [3.0, 11.0]
        assert found["means"] == pytest.approx([3.5, 14 / 6, 0.5])
