"""The layers are torch's own in parameters, names, defaults and values; what they add is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.layer.norm import WholeMapNorm
from fat_train.op.choice import OpConfig, using

PAIRS = [
    (lambda: DepthwiseConv2d(6, 5, 2), lambda: nn.Conv2d(6, 6, 5, 2, padding=2, groups=6)),
    (lambda: DepthwiseConv2d(6, 3), lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6)),
    (lambda: PointwiseConv2d(6, 4), lambda: nn.Conv2d(6, 4, 1)),
    (lambda: WholeMapNorm(6), lambda: nn.GroupNorm(1, 6)),
]


def maps(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 6, 7, 5, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def build(make, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return make().to(dtype)


@pytest.mark.parametrize(("make", "make_torchs"), PAIRS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_layer_is_torchs_in_initial_weights_value_and_gradients(make, make_torchs, layout):
    ours, torchs = build(make), build(make_torchs)
    assert isinstance(ours, type(torchs))
    ours.load_state_dict(torchs.state_dict())
    fresh = build(make)
    for (name, tensor), (its_name, its) in zip(fresh.named_parameters(), torchs.named_parameters(), strict=True):
        assert name == its_name
        assert torch.equal(tensor, its)
    x = maps()
    value, wanted = ours(x.contiguous(memory_format=layout)), torchs(x)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    slope = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
    gradients = torch.autograd.grad((value * slope).sum(), [x, *ours.parameters()])
    for mine, its in zip(
        gradients, torch.autograd.grad((wanted * slope).sum(), [x, *torchs.parameters()]), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("make", "make_torchs"), PAIRS)
def test_under_autocast_a_layer_computes_in_the_type_that_torchs_does_or_the_one_its_readers_round_to(
    make, make_torchs
):
    layer, torchs = build(make, torch.float32), build(make_torchs, torch.float32)
    x = maps(torch.float32).detach().contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, wanted = layer(x), torchs(x)
    assert value.dtype in {wanted.dtype, torch.bfloat16}
    torch.testing.assert_close(value.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_a_residual_is_added_and_shown():
    conv = build(lambda: DepthwiseConv2d(6, 5, residual=True))
    x = maps()
    torch.testing.assert_close(conv(x), x + F.conv2d(x, conv.weight, conv.bias, padding=2, groups=6))
    assert "residual=True" in repr(conv)
    assert "residual" not in repr(DepthwiseConv2d(6, 5))


def test_a_residual_of_another_size_is_a_mistake():
    with pytest.raises(AssertionError):
        DepthwiseConv2d(6, 5, 2, residual=True)


def test_a_map_without_gradient_or_frozen_weights_get_what_they_are_asked_for():
    x = maps(torch.float32).detach().contiguous(memory_format=torch.channels_last)
    for config in (OpConfig(), OpConfig(depthwise="torch")):
        conv = build(lambda: DepthwiseConv2d(6, 3), torch.float32)
        with using(config):
            conv(x).sum().backward()
            assert conv.weight.grad is not None
            assert not conv.requires_grad_(False)(x).requires_grad
            leaf = x.clone().requires_grad_()
            conv(leaf).sum().backward()
            assert leaf.grad is not None
