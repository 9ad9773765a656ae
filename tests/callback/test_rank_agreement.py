"""Ranks learn the largest wish of all of them, each at the same call."""

from __future__ import annotations

import os
import socket
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch.multiprocessing
from torch import distributed

from fat_train.callback.agreement import Agreement, Wish

WISHES = {0: [0, 0, 1, 0, 0], 1: [0, 2, 0, 0, 0]}


def test_one_process_agrees_with_itself_at_once() -> None:
    agreement = Agreement()
    agreement.start(world_size=1)
    assert [agreement.exchange(wish) for wish in Wish] == list(Wish)
    assert agreement.settle(Wish.LEAVE) == Wish.LEAVE
    assert agreement.smallest(7) == 7


def test_two_ranks_learn_each_wish_a_call_later_and_at_a_settling_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers: SimpleQueue[tuple[int, list[int], int, int]] = context.SimpleQueue()
    torch.multiprocessing.spawn(_rank, (port, answers), nprocs=2)
    got: dict[int, Any] = {rank: rest for rank, *rest in (answers.get(), answers.get())}
    assert got[0] == got[1] == [[0, 0, 2, 1, 0], int(Wish.SAVE), 3]


def _rank(rank: int, port: int, answers: SimpleQueue[tuple[int, list[int], int, int]]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    agreement = Agreement()
    agreement.start(world_size=2)
    agreed = [int(agreement.exchange(Wish(wish))) for wish in WISHES[rank]]
    settled = int(agreement.settle(Wish.SAVE if rank else Wish.NOTHING))
    answers.put((rank, agreed, settled, agreement.smallest(3 + rank)))
    distributed.destroy_process_group()
