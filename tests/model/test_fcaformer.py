"""FcaFormer against the released code's numbers, its equations written again, and what its experiments state."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fat_train import create_model
from fat_train.config.compose import compose
from fat_train.config.resolve import resolve
from fat_train.config.zoo import conf_dir, load_model_node
from fat_train.model.fcaformer import (
    ConvBlock,
    ConvStem,
    CrossConfig,
    Downsample,
    FcaBlock,
    FcaFormer,
    FcaFormerConfig,
    PatchStem,
)
from fat_train.op.choice import REFERENCE, using
from fat_train.optim.adamw import AdamWConfig
from fat_train.types import UserError

# The golden file names no labels: of all pairs of classes these alone give its cross entropy to 1e-6.
GOLDEN_LABELS = (3, 7)
TINY = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 1, 3, 2], "num_heads": [0, 0, 2, 3]}
EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("fcaformer_*.yaml"))
HYBRIDS = ["fcaformer_l1_300e", "fcaformer_l2_300e", "fcaformer_l3_300e", "fcaformer_l4_300e"]


def tiny_config(**changes) -> FcaFormerConfig:
    return FcaFormerConfig(**(TINY | changes))


def one_stage(mixer: str, depth: int, **changes) -> FcaFormerConfig:
    """A stage of attention blocks on a map of (image_px / 4)² tokens of 6 channels, two heads."""
    return FcaFormerConfig(name="one", widths=[6], depths=[depth], num_heads=[2], mixers=[mixer], **changes)


def blocks_of(config: FcaFormerConfig, stage: int) -> list[FcaBlock]:
    return list(config.build(0).get_submodule(f"layer_{stage}").blocks)


def randomise(module: nn.Module) -> nn.Module:
    """Weights, affine terms and running statistics away from 0 and 1, where mistakes would hide."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        tensor.data = 0.2 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return module.eval()


def random_map(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64, requires_grad=True)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return torch.einsum("oc,bchw->bohw", layer.weight, x) + layer.bias[:, None, None]


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def conv_norm(x: Tensor, layer: nn.Module) -> Tensor:
    norm = layer.bn
    mean, var, weight, bias = (t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (conv(x, layer.c) - mean) / (var + 1e-5).sqrt() * weight + bias


def layer_norm(x: Tensor, norm: nn.LayerNorm, dim: int, eps: float = 1e-5) -> Tensor:
    """Over axis `dim` of the channels."""
    mean, var = x.mean(dim, keepdim=True), x.var(dim, correction=0, keepdim=True)
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    return (x - mean) / (var + eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


def assert_same_value_and_gradients(value: Tensor, rewritten: Tensor, sources: list[Tensor]) -> None:
    torch.testing.assert_close(value, rewritten, rtol=1e-10, atol=1e-10)
    slope = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
    got = torch.autograd.grad((value * slope).sum(), sources, allow_unused=True)
    wanted = torch.autograd.grad((rewritten * slope).sum(), sources, allow_unused=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def table_entry(block: FcaBlock, side: int, query: tuple[int, int], key: tuple[int, int]) -> Tensor:
    """Both heads' bias, one pair of tokens at a time."""
    dy, dx = key[0] - query[0], key[1] - query[1]
    if block.position_bias == "distance":
        return block.attention_biases[:, abs(dy) * side + abs(dx)]
    return block.attention_biases[:, (dy + side - 1) * (2 * side - 1) + dx + side - 1]


def equations_1_to_4(block: FcaBlock, x: Tensor, cross: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """x^l and x̄^l of a map of the size that the block was made for, image by image and head by head."""
    side, places = x.shape[2], list(itertools.product(range(x.shape[2]), range(x.shape[3])))
    heads, depth = block.num_heads, x.shape[1] // block.num_heads
    regular = torch.stack([x[:, :, i, j] for i, j in places], dim=1)
    tokens = layer_norm(regular, block.norm1, 2)
    bias = torch.stack([torch.stack([table_entry(block, side, q, k) for k in places], -1) for q in places], -2)
    if cross:
        sets = torch.cat(cross, dim=1)
        factors = block.s_scale_factors[0] if block.cross.scale != "none" else 1
        if block.cross.scale == "after_norm":
            sets = factors * layer_norm(sets, block.s_norm, 2)
        else:
            sets = layer_norm(factors * sets, block.s_norm, 2)
        tokens = torch.cat([tokens, sets], dim=1)
        of_cross = torch.stack([block.s_token_bias[0, :, 0]] * len(places), dim=1)
        bias = torch.cat([bias, of_cross], dim=2)
    w_q, w_k, w_v = block.qkv.weight.chunk(3)
    b_q, b_k, b_v = block.qkv.bias.chunk(3)
    q = tokens[:, : len(places)] @ w_q.T + b_q  # Eq. 1
    k, v = tokens @ w_k.T + b_k, tokens @ w_v.T + b_v  # Eq. 2 and 3
    out = []
    for head in range(heads):
        part = slice(head * depth, (head + 1) * depth)
        weights = softmax(q[..., part] @ k[..., part].mT / math.sqrt(depth) + bias[head])
        out.append(weights @ v[..., part])
    attended = torch.cat(out, dim=2) @ block.proj.weight.T + block.proj.bias
    y = (regular + block.gamma_1 * attended).mT.reshape(x.shape)  # Eq. 4
    made = None
    if block.makes_tokens and block.cross.tokens == "tme":
        made = F.conv2d(y, block.dw_conv.weight, None, 4, 3, groups=x.shape[1]).flatten(2).mT
    elif block.makes_tokens:
        rows = [[y[:, :, i : i + 4, j : j + 4].mean((2, 3)) for j in range(0, side, 4)] for i in range(0, side, 4)]
        made = torch.stack([mean for row in rows for mean in row], dim=1)
    z = y if isinstance(block.local_conv, nn.Identity) else conv_norm(y, block.local_conv)
    hidden = layer_norm(layer_norm(z, block.norm2, 1), block.mlp.norm, 1)
    return z + block.gamma_2[:, None, None] * linear(gelu(linear(hidden, block.mlp.fc1)), block.mlp.fc2), made


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("scale", ["before_norm", "after_norm", "none"])
@pytest.mark.parametrize(("tokens", "position_bias"), [("tme", "distance"), ("pooled", "offset")])
def test_a_block_is_equations_1_to_4_and_the_tme(index, scale, tokens, position_bias):
    cross = CrossConfig(tokens=tokens, scale=scale)
    config = one_stage("cross", 4, image_px=36, position_bias=position_bias, cross=cross)
    block = randomise(FcaBlock(config, 0, index, 0.0))
    x = random_map(6, 9, 9)
    read = [(random_map(6, 3, 3).flatten(2).mT * (number + 1)).detach().requires_grad_() for number in block.reads]
    assert len(read) == index
    value, wanted = (
        torch.cat([tensor.flatten() for tensor in both]) for both in (block(x, *read), equations_1_to_4(block, x, read))
    )
    assert_same_value_and_gradients(value, wanted, [x, *read, *block.parameters()])


def test_global_attention_is_the_same_without_cross_tokens_and_without_the_tme():
    block = randomise(FcaBlock(one_stage("global", 2, image_px=36), 0, 1, 0.0))
    x = random_map(6, 9, 9)
    assert block(x)[1] is None
    assert_same_value_and_gradients(block(x)[0], equations_1_to_4(block, x, [])[0], [x, *block.parameters()])


@pytest.mark.parametrize(("height", "width"), [(14, 7), (10, 16), (5, 9)])
@pytest.mark.parametrize("index", [0, 1])
def test_windows_are_swins_of_which_every_other_blocks_start_three_tokens_later(index, height, width):
    block = randomise(FcaBlock(one_stage("window", 2, position_bias="offset"), 0, index, 0.0))
    x = random_map(6, height, width)
    places = list(itertools.product(range(height), range(width)))
    shift = [3 * index * (side > 7) for side in (height, width)]
    tokens = torch.stack([layer_norm(x, block.norm1, 1)[:, :, i, j] for i, j in places], dim=1)
    window = [((i - shift[0]) // 7, (j - shift[1]) // 7) for i, j in places]  # -1 before the first whole one
    qkv = (tokens @ block.qkv.weight.T + block.qkv.bias).unflatten(2, (3, 2, 3))
    rows = []
    for place, its in zip(places, window, strict=True):
        inside = [index for index, other in enumerate(window) if other == its]
        bias = torch.stack([table_entry(block, 7, place, places[key]) for key in inside], dim=-1)
        scores = torch.einsum("bhd,bkhd->bhk", qkv[:, places.index(place), 0], qkv[:, inside, 1]) / math.sqrt(3)
        rows.append(torch.einsum("bhk,bkhd->bhd", softmax(scores + bias), qkv[:, inside, 2]).flatten(1))
    wanted = (torch.stack(rows, dim=1) @ block.proj.weight.T + block.proj.bias).mT.reshape(x.shape)
    sources = [x, block.attention_biases, *block.norm1.parameters(), *block.qkv.parameters(), *block.proj.parameters()]
    assert_same_value_and_gradients(block.mix_windows(x, block.shift), wanted, sources)


def test_conv_block_downsampling_and_stems_are_what_their_docstrings_say():
    x = random_map(8, 9, 6)
    block = randomise(ConvBlock(tiny_config(), 0, 0.0))
    hidden = gelu(linear(layer_norm(conv(x, block.dwconv), block.norm, 1, eps=1e-6), block.pwconv1))
    wanted = x + block.gamma[:, None, None] * linear(hidden, block.pwconv2)
    assert_same_value_and_gradients(block(x)[0], wanted, [x, *block.parameters()])

    down = randomise(Downsample(8, 12))
    wanted = conv_norm(gelu(conv_norm(gelu(conv_norm(x, down.conv1)), down.conv2)), down.conv3)
    assert wanted.shape[2:] == (5, 3)
    assert_same_value_and_gradients(down(x), wanted, [x, *down.parameters()])

    image = random_map(3, 37, 20)
    stem = randomise(ConvStem(3, 8))
    assert_same_value_and_gradients(
        stem(image), conv_norm(gelu(conv_norm(image, stem.seq[0])), stem.seq[2]), [image, *stem.parameters()]
    )
    stem = randomise(PatchStem(3, 4))
    filled = torch.cat([image, image.new_zeros(2, 3, 11, 20)], dim=2)
    filled = torch.cat([filled, image.new_zeros(2, 3, 48, 12)], dim=3)
    patches = filled.unflatten(3, (2, 16)).unflatten(2, (3, 16))
    wanted = torch.einsum("bchiwj,ocij->bohw", patches, stem.proj.weight) + stem.proj.bias[:, None, None]
    assert_same_value_and_gradients(stem(image), wanted, [image, *stem.parameters()])


@pytest.mark.parametrize(
    ("cross", "read"),
    [
        (CrossConfig(), [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (CrossConfig(reach="paper"), [[], [], [0], [0, 1], [0, 1, 2]]),
        (CrossConfig(max_sets=2), [[], [0], [0, 1], [1, 2], [2, 3]]),
        (CrossConfig(max_sets=1, reach="paper"), [[], [], [0], [1], [2]]),
    ],
    ids=["released", "paper", "two newest", "one, paper"],
)
def test_a_block_reads_the_newest_sets_in_its_reach_and_makes_what_a_later_one_reads(cross, read):
    stage = one_stage("cross", 5, image_px=32, cross=cross).build(0).eval().layer_0
    assert [list(block.reads) for block in stage.blocks] == read
    assert [block.makes_tokens for block in stage.blocks] == [any(i in sets for sets in read) for i in range(5)]
    for block in stage.blocks:
        block.gamma_1.data.fill_(1)
    x = torch.randn(1, 6, 8, 8)
    made, got = [], []

    def see(block: nn.Module, inputs: tuple[Tensor, ...], out: tuple[Tensor, Tensor | None]) -> None:
        got.append(inputs[1:])
        made.append(out[1])

    for block in stage.blocks:
        block.register_forward_hook(see)
    stage(x)
    for sets, inputs in zip(read, got, strict=True):
        assert len(sets) == len(inputs)
        assert all(made[index] is given for index, given in zip(sets, inputs, strict=True))


def test_released_order_makes_positive_scale_factors_inert_and_the_papers_does_not():
    x, read = random_map(6, 8, 8), [random_map(6, 2, 2).flatten(2).mT]
    moved = {}
    for scale in ("before_norm", "after_norm"):
        config = one_stage("cross", 3, image_px=32, cross=CrossConfig(scale=scale))
        block = randomise(FcaBlock(config, 0, 1, 0.0))
        before = block(x, *read)[0]
        block.s_scale_factors.data *= 7
        moved[scale] = (block(x, *read)[0] - before).abs().max().item()
    assert moved["before_norm"] < 1e-3 * moved["after_norm"]
    assert moved["after_norm"] > 1e-3


@pytest.mark.parametrize("position_bias", ["distance", "offset"])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 11), (16, 3), (1, 6), (9, 1)])
def test_position_tables_keep_their_ends_and_straight_lines_at_any_size(position_bias, height, width):
    """A bias that falls linearly with the distance still does, and from 0 to the same largest one."""
    block = FcaBlock(one_stage("cross", 2, image_px=32, position_bias=position_bias), 0, 0, 0.0).double()
    first, entries = (0, 8) if position_bias == "distance" else (-1, 15)
    line = torch.linspace(first, 1, entries, dtype=torch.float64)
    block.attention_biases.data = torch.stack([(line[:, None] + 3 * line).flatten(), 0 * line.repeat(len(line)) + 2])
    bias = block.bias(height, width).view(2, height, width, height, width)
    y, x = (torch.arange(side).double() / max(1, side - 1) for side in (height, width))
    dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
    if position_bias == "distance":
        dy, dx = dy.abs(), dx.abs()
    torch.testing.assert_close(bias[0], dy[:, None, :, None] + 3 * dx[None, :, None, :])
    torch.testing.assert_close(bias[1], torch.full_like(bias[1], 2))


def test_cross_biases_and_scale_factors_are_interpolated_set_by_set_and_stay_as_they_are_at_their_size():
    block = FcaBlock(one_stage("cross", 3, image_px=32), 0, 2, 0.0)
    block.s_token_bias.data = torch.arange(16.0).view(1, 2, 1, 8)
    block.s_scale_factors.data = torch.tensor([2.0] * 4 + [5.0] * 4).view(1, 8, 1)
    assert torch.equal(block._for_cells(block.s_token_bias, 8, 8), torch.arange(16.0).view(2, 8))
    factors = block._for_cells(block.s_scale_factors, 12, 20)
    torch.testing.assert_close(factors, torch.tensor([2.0] * 15 + [5.0] * 15)[None])
    halves = block._for_cells(block.s_token_bias, 8, 16).view(2, 2, 2, 4)  # twice as many columns, each half as wide
    torch.testing.assert_close(halves[0, 0, 0], torch.tensor([0.0, 0.25, 0.75, 1.0]))


@pytest.mark.parametrize("mixers", [["conv", "conv", "cross", "cross"], ["conv", "global", "window", "window"]])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (384, 384), (192, 320), (97, 33)])
@torch.no_grad()
def test_any_image_size_works_and_each_map_has_the_ceiling_of_size_over_stride(mixers, height, width):
    heads = [0 if mixer == "conv" else 2 for mixer in mixers]
    model = tiny_config(mixers=mixers, num_heads=heads).build(10).eval()
    image = torch.zeros(1, 3, height, width)
    assert model(image).shape == (1, 10)
    pyramid = model.pyramid(image)
    assert pyramid.strides == (4, 8, 16, 32)
    for level, stride in zip(pyramid.maps, pyramid.strides, strict=True):
        assert level.shape[2:] == (-(-height // stride), -(-width // stride))


@torch.no_grad()
def test_the_plain_one_has_one_level_of_stride_16():
    model = create_model("fcaformer_l0", features_only=True, depths=[2]).eval()
    (level,) = model(torch.zeros(1, 3, 100, 64))
    assert level.shape == (1, 192, 7, 4)
    assert model.feature_info.reduction() == [16]


def test_narrow_maps_give_the_tokens_and_the_bfloat16_gradients_of_wide_ones():
    block = FcaBlock(one_stage("cross", 2), 0, 0, 0.0)
    weight = block.dw_conv.weight
    for height, width in ((2, 2), (1, 3), (3, 1), (5, 2)):
        y = torch.randn(4, 6, height, width).contiguous(memory_format=torch.channels_last)
        wanted = F.conv2d(y.double(), weight.double(), None, 4, 3, groups=6).flatten(2).mT
        torch.testing.assert_close(block.merge(y).double(), wanted, rtol=1e-5, atol=1e-6)
        (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), weight)
        for _ in range(8):
            spent = [torch.full((size,), math.nan) for size in (294, 1176, 3136, 12544)]
            del spent  # memory that a kernel may be given and must not read
            with torch.autocast("cpu", dtype=torch.bfloat16):
                (grad,) = torch.autograd.grad(block.merge(y).float().square().sum(), weight)
            torch.testing.assert_close(grad, wanted_grad, rtol=0.05, atol=0.05 * wanted_grad.abs().max().item())


def test_the_norm_behind_the_pooling_goes_and_comes_with_it():
    model = tiny_config().build(10)
    model.reset_classifier(0, "")
    assert "norm_head.weight" not in model.state_dict()
    model.reset_classifier(5, "avg")
    pooled = model.eval().forward_head(torch.randn(2, 24, 3, 3) + 4, pre_logits=True)
    torch.testing.assert_close(pooled.mean(1), torch.zeros(2), rtol=0, atol=1e-5)
    before = model.norm_head
    model.reset_classifier(7)
    assert model.norm_head is before


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    logits = model(x)
    logits.square().mean().backward()
    return {"logits": logits.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


@pytest.mark.slow  # of the default options test_every_family.py shows it
@pytest.mark.compile
@pytest.mark.parametrize(
    "changes",
    [
        {"mixers": ["window", "window", "global", "window"], "num_heads": [2, 2, 2, 3], "position_bias": "offset"},
        {"cross": CrossConfig(tokens="pooled", scale="after_norm", reach="paper"), "image_px": 96},
        {"widths": [12], "depths": [3], "num_heads": [2], "mixers": ["cross"], "stem": "patch"},
    ],
    ids=["windows", "pooled", "plain"],
)
def test_every_mixer_is_one_graph_that_computes_and_exports_what_eager_code_does(changes):
    torch.manual_seed(0)
    model = tiny_config(layer_scale_init=0.5, **changes).build(10).double().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 72, 100, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    wanted = step(model, x)
    model.zero_grad()
    torch.compiler.reset()
    model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    for name, tensor in step(model, x).items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-8, atol=1e-10)
    fresh = tiny_config(layer_scale_init=0.5, **changes).build(10).eval()
    with using(REFERENCE), torch.no_grad():
        sizes = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(fresh, (x.float(),), dynamic_shapes=(sizes,), strict=True)
        more = torch.randn(5, 3, 72, 100)
        torch.testing.assert_close(program.module()(more), fresh(more), rtol=1e-4, atol=1e-5)


def test_weights_start_as_the_released_codes_do():
    model = create_model("fcaformer_l1", depths=[1, 1, 2, 2])
    state = dict(model.named_parameters())
    gammas = [tensor for name, tensor in state.items() if "gamma" in name]
    assert len(gammas) == 2 + 2 * 4
    assert all((tensor == 1e-6).all() for tensor in gammas)
    assert state["layer_3.blocks.0.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert state["head.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(tensor.any() for name, tensor in state.items() if name.endswith(("biases", "token_bias", ".bias")))
    assert (state["layer_2.blocks.1.s_scale_factors"] == 1).all()


def test_scale_factors_and_bias_tables_are_decayed_as_by_the_released_code():
    model = tiny_config().build(10)
    spared, decayed = AdamWConfig().build(model, lr=1e-3).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {names[parameter] for parameter in decayed["params"]}
    assert {"layer_2.blocks.1.s_scale_factors", "layer_2.blocks.1.s_token_bias"} <= decayed
    assert "layer_2.blocks.0.attention_biases" in decayed
    assert "layer_2.blocks.0.gamma_1" in {names[parameter] for parameter in spared["params"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["conv", "conv", "cross", "swin"]}, "model.mixers=swin is not known"),
        ({"widths": [8, 12]}, "model.widths must be 4 numbers of at least 1, one a mixer; got [8, 12]"),
        ({"depths": [1, 1, 0, 1]}, "model.depths must be 4 numbers of at least 1, one a mixer; got [1, 1, 0, 1]"),
        ({"num_heads": [0, 0, 3, 3]}, "model.num_heads must divide model.widths [8, 12, 16, 24] and be 0 in stages"),
        ({"num_heads": [2, 0, 2, 3]}, "['conv', 'conv', 'cross', 'cross']; got [2, 0, 2, 3]"),
        ({"num_heads": [0, 0, 0, 3]}, "got [0, 0, 0, 3]"),
        ({"num_heads": [0, 0, 2]}, "got [0, 0, 2]"),
        ({"widths": [9, 12, 16, 24]}, "model.widths must start with an even number; got [9, 12, 16, 24]"),
        ({"stem": "convs"}, "model.stem=convs is not known; did you mean conv?"),
        ({"position_bias": "none"}, "model.position_bias=none is not known"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be at least 1; got 0"),
        ({"image_px": 16}, "model.image_px must be at least 32; got 16"),
        ({"layer_scale_init": 0.0}, "model.layer_scale_init must be positive; got 0.0"),
        ({"drop_path_rate": 1.0}, "model.drop_path_rate must be in [0, 1); got 1.0"),
        ({"cross": {"tokens": "conv"}}, "model.cross.tokens=conv is not known"),
        ({"cross": {"scale": "norm"}}, "model.cross.scale=norm is not known"),
        ({"cross": {"reach": "all"}}, "model.cross.reach=all is not known"),
        ({"cross": {"max_sets": 0}}, "model.cross.max_sets must be at least 1; got 0"),
    ],
)
def test_impossible_values_are_refused_by_name(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        resolve(TINY | changes, FcaFormerConfig, where="model")


def counts(config: FcaFormerConfig) -> tuple[int, float]:
    """Parameters, and 10⁹ multiply-adds at 224 px."""
    with torch.device("meta"):
        model = config.build(1000).eval()
        image = torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e9


@pytest.mark.parametrize(
    ("name", "parameters", "macs_g"),
    [
        ("fcaformer_l1", 6_187_560, 1.374),
        ("fcaformer_l2", 16_275_870, 3.602),
        ("fcaformer_l3", 27_894_484, 6.651),
        ("fcaformer_l4", 65_638_204, 14.492),
    ],
)
def test_counts_are_those_of_the_released_code(name, parameters, macs_g):
    config = resolve(load_model_node(name), where="model")
    assert counts(config) == (parameters, pytest.approx(macs_g, abs=5e-4))


def test_the_papers_reach_costs_less_than_its_table_5_says():
    config = resolve(compose("train", ["model=fcaformer_l1", "model.cross.reach=paper"]).model, where="model")
    assert counts(config)[1] == pytest.approx(1.358, abs=5e-4)  # the paper: 1.37


def header(name: str) -> dict[str, float]:
    text = (conf_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    return {key: float(value) for key, value in re.findall(r"^# (\w+): ([\d.]+)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if "table" in name])
def test_an_ablation_has_the_counts_of_its_header_which_are_near_the_papers(name):
    stated = header(name)
    parameters, macs_g = counts(resolve(compose("train", [f"experiment={name}"]).model, where="model"))
    assert parameters == stated["parameters"]
    assert macs_g == pytest.approx(stated["macs_g"], abs=5e-4)
    if "params_differ_percent" in stated:
        differ = abs(parameters / 1e6 / stated["paper_params_m"] - 1) * 100
        assert differ <= stated["params_differ_percent"]
    else:
        assert round(parameters / 1e6, 2) == stated["paper_params_m"]
    assert abs(macs_g - stated["paper_macs_g"]) < 0.01


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_named_as_its_file_and_trains_by_the_papers_recipe(name):
    tree = compose("train", [f"experiment={name}"])
    groups = {key: resolve(tree[key], where=key) for key in ("model", "augment", "optim", "schedule", "callback")}
    optim, schedule = groups["optim"], groups["schedule"]
    scale = tree.trainer.global_batch / optim.lr_per_images
    plain = name == "fcaformer_l0_300e"
    assert tree.name == name
    assert tree.trainer.global_batch == 1024
    assert (schedule.epochs, optim.weight_decay, optim.clip_grad_norm) == (300, 0.05, 0)
    assert optim.base_lr * scale == pytest.approx(1e-3 if plain else 2e-3)
    assert schedule.warmup_lr * scale == pytest.approx(1e-6 if plain else 0)
    assert schedule.min_lr * scale == pytest.approx(1e-5 if plain else 1e-6)
    assert schedule.warmup_epochs == (5 if plain else 20)
    assert groups["callback"].ema.decay == (0 if plain else 0.9999)
    assert groups["augment"].repeats == (3 if plain else 1)
    drop_path = {"l0": 0.1, "l1": 0.0, "l2": 0.1, "l3": 0.2, "l4": 0.4}
    assert groups["model"].drop_path_rate == drop_path[name.split("_")[1]]


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Mapping[str, np.ndarray]:
    with np.load(shared_dir / "reference" / "fcaformer_tiny_golden.npz") as archive:
        return dict(archive)


def build_golden(golden: Mapping[str, np.ndarray], dtype: torch.dtype) -> FcaFormer:
    size = {"widths": [16, 24, 32, 48], "depths": [1, 1, 3, 2], "num_heads": [0, 0, 2, 3]}
    model = FcaFormerConfig(name="tiny", image_px=96, **size).build(10)
    model.load_state_dict({key[6:]: torch.from_numpy(golden[key]) for key in golden if key.startswith("state/")})
    return model.to(dtype)


def assert_close(actual: Tensor, expected: np.ndarray, relative: float) -> None:
    """Against the largest number of the array: single entries may be near 0."""
    reference = torch.from_numpy(expected).double()
    assert (actual.double() - reference).abs().max() <= relative * reference.abs().max()


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_logits_and_stages_are_those_of_the_released_code(golden, dtype, relative, layout):
    model = build_golden(golden, dtype).eval().to(memory_format=layout)
    x = torch.from_numpy(golden["input"]).to(dtype).contiguous(memory_format=layout)
    assert_close(model(x), golden["eval/logits"], relative)
    x = model.embed(x)
    assert_close(x, golden["eval/patch_embed"], relative)
    for stage in range(4):
        x = model.run_stage(stage, x).next
        expected = golden[f"eval/layer_{stage}"]
        assert_close(x if expected.ndim == 4 else x.flatten(2).mT, expected, relative)


@pytest.mark.parametrize(
    # The file holds gradients in float32: they cannot be met closer than its rounding.
    ("dtype", "relative", "gradient_relative"),
    [(torch.float64, 1e-9, 2**-23), (torch.float32, 1e-4, 1e-4)],
)
def test_a_training_steps_loss_and_gradients_are_those_of_the_released_code(golden, dtype, relative, gradient_relative):
    model = build_golden(golden, dtype).train()
    logits = model(torch.from_numpy(golden["input"]).to(dtype))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN_LABELS))
    loss.backward()
    assert_close(logits.detach(), golden["train/logits"], relative)
    assert_close(loss.detach(), golden["train/loss"], relative)

    expected = {key.removeprefix("train/grad/"): golden[key] for key in golden if key.startswith("train/grad/")}
    assert dict(model.named_parameters()).keys() == expected.keys()
    rounding = relative * max(np.abs(gradient).max() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        reference = torch.from_numpy(expected[name]).double()
        difference = (parameter.grad.double() - reference).abs().max()
        assert difference <= gradient_relative * reference.abs().max() + rounding, name
