"""Two processes with half of the images each normalise, learn and remember as one process with all of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from fat_train.trainer.sync_batch_norm import SyncBatchNorm2d, SyncBatchNorms

pytestmark = pytest.mark.compile
IMAGES = 3 + torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
IMAGES[4:] *= 2  # the ranks' own statistics differ


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Flatten()
        )
        .train()
        .double()
    )


def steps(model: nn.Module, images: Tensor) -> Tensor:
    for number in range(3):
        model.zero_grad()
        out = model(images + number)
        (out.square() * torch.linspace(0, 1, out.shape[1], dtype=out.dtype)).mean().backward()
    return out.detach()


def _rank(rank: int, port: int, folder: str) -> None:
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        found = {}
        for compiled in (False, True):
            model = build()
            model.compile(fullgraph=True, dynamic=False, backend="aot_eager", disable=not compiled)
            SyncBatchNorms().apply(model)
            assert type(model[1]) is SyncBatchNorm2d
            out = steps(DistributedDataParallel(model), IMAGES[4 * rank :][:4])
            found[compiled] = (out, {name: p.grad for name, p in model.named_parameters()}, model.state_dict())
            SyncBatchNorms().revert(model)
            assert type(model[1]) is nn.BatchNorm2d
        torch.save((found, counters["stats"]["unique_graphs"], dict(counters["graph_break"])), f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_two_ranks_are_one_in_values_gradients_and_running_statistics_eager_and_as_one_graph(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    whole = build()
    out = steps(whole, IMAGES)
    for rank in range(2):
        found, graphs, breaks = torch.load(tmp_path / f"{rank}.pt")
        assert (graphs, breaks) == (1, {})
        for ours, gradients, state in found.values():
            torch.testing.assert_close(ours, out[4 * rank :][:4])
            for name, parameter in whole.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, msg=name)
            for name, value in whole.state_dict().items():
                torch.testing.assert_close(state[name], value, msg=name)
