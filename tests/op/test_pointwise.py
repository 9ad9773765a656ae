"""1×1 convolution by every way that a CPU has, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fat_train.layer.conv import PointwiseConv2d
from fat_train.op import pointwise
from fat_train.op.choice import OpConfig, using
from fat_train.op.pointwise import ACTIVATIONS, pointwise_conv


@pytest.mark.parametrize("way", ["torch", "gemm", "onednn"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_every_way_is_the_definition_in_value_and_gradients(way, activation, layout):
    x = torch.randn(2, 6, 5, 7).to(memory_format=layout).requires_grad_()
    conv = PointwiseConv2d(6, 9, activation)
    with using(OpConfig(pointwise=way)):
        y = conv(x)
        with torch.no_grad():
            inferred = conv(x)
    reference_x, weight, bias = (t.detach().double().requires_grad_() for t in (x, conv.weight, conv.bias))
    reference = pointwise.plain(reference_x, weight, bias, activation)
    slope = torch.randn(y.shape)
    y.backward(slope)
    reference.backward(slope.double())
    for ours, theirs in (
        (y, reference),
        (inferred, reference),
        (x.grad, reference_x.grad),
        (conv.weight.grad, weight.grad),
        (conv.bias.grad, bias.grad),
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_matrix_product_reads_and_writes_the_map_where_it_is():
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    with using(OpConfig(pointwise="gemm")):
        y = pointwise_conv(x, torch.randn(4, 6, 1, 1), None)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not pointwise._has_onednn(), reason="this torch has no oneDNN")
def test_torchs_counter_counts_onednns_convolution_with_its_activation():
    with torch.no_grad(), using(OpConfig(pointwise="onednn")), FlopCounterMode(display=False) as counter:
        pointwise_conv(torch.randn(2, 6, 5, 7), torch.randn(4, 6, 1, 1), torch.randn(4), "gelu")
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 6 * 4
