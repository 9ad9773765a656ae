"""Multiply-adds and bytes, against counts by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat_train import create_model
from fat_train.benchmark.model_cost import DeviceRates, StepCost, count, open_copy, open_gemm
from fat_train.benchmark.plain_fat import PlainFAT


class Attention(nn.Module):
    """Two heads over 12 tokens of 4 channels, from the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.reshape(-1, 2, 12, 4)
        return torch.softmax(q @ q.transpose(2, 3), dim=-1) @ q


class Fused(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = x.reshape(-1, 2, 12, 4)
        return F.scaled_dot_product_attention(q, q, q)


def test_a_convolution_reads_its_map_and_kernel_and_writes_its_map_and_norms_between_are_free() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.GELU())
    cost = count(model, (5, 3, 16, 16), trains=False)
    assert cost.flops == 2 * 5 * 8 * 8 * 8 * 27
    assert cost.elements == 5 * 3 * 256 + 8 * 27 + 5 * 8 * 64
    assert cost.parameters == 8 * 27 + 16
    assert cost.bytes(2) == 2 * cost.elements


def test_a_grouped_convolution_costs_as_much_again_for_each_of_its_two_gradients() -> None:
    grouped = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
    first = nn.Conv2d(3, 8, 1, bias=False)
    forward = [2 * 4 * 256 * 8 * 25, 2 * 4 * 256 * 8 * 3]
    cost = count(nn.Sequential(first, grouped), (4, 3, 16, 16), trains=True)
    assert cost.flops == 3 * forward[0] + 2 * forward[1]  # nobody wants the image's gradient
    passes_of_adamw = 7 * 4 * (8 * 25 + 8 * 3)
    assert cost.bytes(4) - 4 * cost.elements == passes_of_adamw


def test_logits_of_attention_cost_no_bytes_whether_it_is_written_out_or_not() -> None:
    cost = count(Attention(), (3, 96), trains=False)
    assert cost.flops == 2 * 2 * (3 * 2 * 12 * 12 * 4)
    assert cost.elements == 4 * (3 * 2 * 12 * 4)  # q and k, v and the result
    assert count(Fused(), (3, 96), trains=False) == cost


@pytest.mark.parametrize("trains", [False, True])
def test_the_plain_equations_and_the_model_cost_the_same_on_paper(trains: bool) -> None:
    model = create_model("fat_nano")
    cost = count(PlainFAT(model.config, 1000), (2, 3, 224, 224), trains)
    assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
    if not trains:
        assert cost.flops / 2 / 2e9 == pytest.approx(0.065, abs=5e-4)  # the header of conf/model/fat_nano.yaml


def test_the_counted_model_is_left_as_it_is() -> None:
    model = nn.Conv2d(3, 4, 1)
    weight = model.weight.detach().clone()
    count(model, (1, 3, 4, 4), trains=True)
    assert model.weight.device.type == "cpu"
    assert model.weight.grad is None
    assert torch.equal(model.weight, weight)


def test_the_floor_is_the_longer_of_computing_and_moving() -> None:
    cost = StepCost(flops=4_000, elements=100, parameters=0, trains=False)
    assert DeviceRates(1_000, 100).floor_s(cost.flops, cost.bytes(4)) == 4.0
    assert DeviceRates(1_000, 100).floor_s(cost.flops, cost.bytes(8)) == 8.0
    assert math.isnan(DeviceRates().floor_s(1, 1))


def test_the_device_shows_its_rates_by_real_work() -> None:
    gemm, copied = open_gemm("cpu", torch.float32, repeats=1), open_copy("cpu", repeats=2)
    assert next(gemm.work) == 2 * 1536**3
    assert next(copied.work) == 2 * 2 * 2**27
