"""Each operation's formula written again, tap by tap and sum by sum, in float64: whichever way computes it, value and
gradients are the formula's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fat_train.op.attention import attention
from fat_train.op.choice import DEVICE_OF, WAYS, OpConfig, using
from fat_train.op.depthwise import depthwise_conv
from fat_train.op.group_norm import whole_map_norm
from fat_train.op.interaction import interaction
from fat_train.op.pointwise import pointwise_conv

SIZES = [(2, 5, 7, 6), (1, 8, 1, 1), (3, 4, 2, 9)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def ways(operation: str) -> list[str]:
    """Those that a CPU has, and `auto`; in float64 our C++ steps aside, in float32 it takes part."""
    return ["auto", *(way for way in WAYS[operation] if DEVICE_OF.get(way, "cpu") == "cpu")]


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_computes(
    ours: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor, config: OpConfig
) -> None:
    """In float64 to 1e-10 and in float32 to 1e-4 of the largest number."""
    wanted = [t.detach().requires_grad_() for t in inputs]
    reference = formula(*wanted)
    slope = normal(*reference.shape, seed=9)
    gradients = torch.autograd.grad(reference, wanted, slope)
    for dtype, relative in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        got = [t.detach().to(dtype).requires_grad_() for t in inputs]
        with using(config):
            value = ours(*got)
        assert value.dtype == dtype
        pairs = zip([value, *torch.autograd.grad(value, got, slope.to(dtype))], [reference, *gradients], strict=True)
        scale = max(g.abs().max() for g in gradients)  # gradients that are 0 in truth are rounding of the others
        for number, (mine, theirs) in enumerate(pairs):
            assert mine.shape == theirs.shape
            largest = theirs.abs().max() if number == 0 else scale
            assert (mine.double() - theirs).abs().max() <= relative * largest


def taps(x: Tensor, weight: Tensor, bias: Tensor, stride: int, residual: bool) -> Tensor:
    """Every tap of the kernel is a shifted view of the map with zeros around it."""
    (_, _, height, width), size = x.shape, weight.shape[-1]
    around = torch.nn.functional.pad(x, [size // 2] * 4)
    y = bias[:, None, None].expand(x[:, :, ::stride, ::stride].shape)
    for u in range(size):
        for v in range(size):
            seen = around[:, :, u : u + height : stride, v : v + width : stride]
            y = y + weight[:, 0, u, v, None, None] * seen
    return x + y if residual else y


@pytest.mark.parametrize("way", ways("depthwise"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel_size", "stride", "residual"), [(3, 1, True), (5, 2, False), (7, 1, False), (9, 1, True)]
)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_depthwise_convolution_is_its_sum_of_taps(sizes, kernel_size, stride, residual, layout, way):
    channels = sizes[1]
    inputs = normal(channels, 1, kernel_size, kernel_size, seed=1), normal(channels, seed=2)
    assert_computes(
        lambda x, w, b: depthwise_conv(x, w, b, stride, residual=residual),
        lambda x, w, b: taps(x, w, b, stride, residual),
        normal(*sizes).contiguous(memory_format=layout),
        *inputs,
        config=OpConfig(depthwise=way),
    )


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("height", [1, 2, 7])
def test_a_strided_bfloat16_map_of_one_column_has_its_weights_gradient(height, kernel_size):
    """Where memory is reused that holds no numbers: torch's own convolution gives some of it out as the gradient."""
    x = normal(4, 8, height, 1).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = normal(8, 1, kernel_size, kernel_size, seed=1).bfloat16().to(memory_format=torch.channels_last)
    exact = weight.double().requires_grad_()
    slope = normal(4, 8, -(-height // 2), 1, seed=2).bfloat16()
    (wanted,) = torch.autograd.grad(taps(x.double(), exact, torch.zeros(8), 2, False), exact, slope.double())
    for _ in range(5):
        inputs = weight.clone().requires_grad_()
        y = depthwise_conv(x, inputs, None, 2)
        for numbers in (72, 144, 200, 288, 392, 576, 800, 1568, 5000):
            torch.full((numbers,), math.nan)
        (got,) = torch.autograd.grad(y, inputs, slope)
        assert (got.double() - wanted).abs().max() <= 2e-2 * wanted.abs().max()


@pytest.mark.parametrize("way", ways("pointwise"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_pointwise_convolution_is_a_matrix_product_at_every_pixel(sizes, layout, way):
    assert_computes(
        pointwise_conv,
        lambda x, w, b: torch.einsum("bchw,oc->bohw", x, w[:, :, 0, 0]) + b[:, None, None],
        normal(*sizes).contiguous(memory_format=layout),
        normal(11, sizes[1], 1, 1, seed=1),
        normal(11, seed=2),
        config=OpConfig(pointwise=way),
    )


@pytest.mark.parametrize("way", ways("norm"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_whole_map_norm_takes_its_moments_over_channels_and_pixels(sizes, layout, way):
    def formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = x.sum((1, 2, 3), keepdim=True) / x[0].numel()
        variance = ((x - mean) ** 2).sum((1, 2, 3), keepdim=True) / x[0].numel()
        return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]

    assert_computes(
        lambda x, w, b: whole_map_norm(x, w, b, 1e-5),
        formula,
        3 + 2 * normal(*sizes).contiguous(memory_format=layout),
        normal(sizes[1], seed=1),
        normal(sizes[1], seed=2),
        config=OpConfig(norm=way),
    )


@pytest.mark.parametrize("way", ways("interaction"))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_interaction_is_equations_8_to_11(sizes, both_ways, layout, way):
    def formula(q_prime: Tensor, global_: Tensor) -> Tensor:
        local = q_prime / (1 + torch.exp(-q_prime))  # Eq. 8
        gated_local = local / (1 + torch.exp(-global_))  # Eq. 9
        gated_global = global_ / (1 + torch.exp(-local)) if both_ways else global_  # Eq. 10
        return gated_global * gated_local

    maps = (2 * normal(*sizes, seed=seed).contiguous(memory_format=layout) for seed in (0, 1))
    assert_computes(lambda q, g: interaction(q, g, both_ways), formula, *maps, config=OpConfig(interaction=way))


@pytest.mark.parametrize("way", ways("attention"))
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "depth"), [(2, 3, 35, 9, 16), (1, 2, 1, 1, 8), (2, 1, 6, 7, 5)]
)
def test_attention_is_a_mean_of_the_values_weighed_by_exponentials(batch, heads, queries, keys, depth, way):
    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.exp(torch.einsum("bmid,bmjd->bmij", q, k) / math.sqrt(depth))
        return torch.einsum("bmij,bmjd->bmid", weights, v) / weights.sum(-1, keepdim=True)

    maps = (
        normal(batch, tokens, heads, depth, seed=seed).transpose(1, 2)
        for seed, tokens in enumerate((queries, keys, keys))
    )
    assert_computes(attention, formula, *maps, config=OpConfig(attention=way))
