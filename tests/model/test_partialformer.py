"""PartialFormer's equations written again, the readings that its counts decide between, and the sizes of its maps."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fat_train import create_model, list_models
from fat_train.config.compose import compose
from fat_train.config.run import Problems, plain, resolve_run
from fat_train.config.zoo import conf_dir
from fat_train.model.partialformer import (
    PartialAttention,
    PartialFormerBlock,
    PartialFormerConfig,
    Stem,
    foreground,
    num_foreground,
)
from fat_train.types import UserError

TINY = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "num_heads": [2, 3, 4, 6], "head_width": 32}
SIZES = list_models("partialformer_b*")


def tiny_config(**changes) -> PartialFormerConfig:
    return PartialFormerConfig(**(TINY | changes))


def attention(fraction: float = 0.3, **changes) -> PartialAttention:
    options = {"head_expansion": 2, "reduction": 1, "out_proj": "foreground", "sqa_order": "printed"} | changes
    return randomise(PartialAttention(12, 3, fraction=fraction, **options))


def randomise(module: nn.Module) -> nn.Module:
    """Weights, affine terms and running statistics away from 0 and 1, where mistakes would hide."""
    generator = torch.Generator().manual_seed(0)
    for tensor in module.parameters():
        tensor.data = 0.2 + 0.5 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    for tensor in module.buffers():
        if tensor.is_floating_point():
            tensor.data = 0.2 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return module.eval()


def random_map(channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64, requires_grad=True)


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    y = x @ layer.weight.flatten(1).t()
    return y if layer.bias is None else y + layer.bias


def layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Over the last axis."""
    mean, var = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight + layer.bias


def map_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return layer_norm(x.permute(0, 2, 3, 1), layer).permute(0, 3, 1, 2)


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: Tensor) -> Tensor:
    return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)


def equation_5_4(c: list[float]) -> list[int]:
    """All places, by descending score, the earlier one first where two are equal."""
    return sorted(range(len(c)), key=lambda place: (-c[place], place))


def equations_5_5_to_5_7(attn: PartialAttention, x: Tensor, s: list[int], num: int) -> Tensor:
    """One image's tokens [N, d]: sorted as a whole, cut in two, put back by the inverse order."""
    h, d = attn.num_heads, x.shape[1]
    gathered = torch.stack([x[place] for place in s])
    x_f, x_b = torch.cat([attn.abstract[None], gathered[:num]]), gathered[num:]
    q, k, v = (part.view(-1, h, d // h) for part in linear(x_f, attn.qkv).chunk(3, dim=1))
    logits = [q[:, head] @ k[:, head].t() / math.sqrt(d // h) for head in range(h)]
    w1, w2 = attn.before.weight, attn.after.weight
    mixed = [softmax(sum(w1[g, head] * logits[head] for head in range(h))) for g in range(len(w1))]
    weights = [sum(w2[head, g] * mixed[g] for g in range(len(w1))) for head in range(h)]
    o_f = torch.cat([weights[head] @ v[:, head] for head in range(h)], dim=1)  # Eq. 5.5
    o_f = o_f if attn.project_all else linear(o_f, attn.proj)
    _, k_b, v_b = (part.view(-1, h, d // h) for part in linear(x_b, attn.qkv).chunk(3, dim=1))
    q_a = o_f[0].view(h, d // h)
    scores = [q_a[head] @ k_b[:, head].t() / math.sqrt(d // h) for head in range(h)]
    y_b = torch.cat([softmax(scores[head]) @ v_b[:, head] for head in range(h)])  # Eq. 5.6
    first, norm, _, last = attn.channel_mlp
    hidden = layer_norm(linear(y_b, first), norm)
    o_b = x_b + linear(hidden * (hidden > 0), last)  # Eq. 5.7
    ordered = torch.cat([o_f[1:], o_b])
    out = torch.stack([ordered[s.index(place)] for place in range(len(s))])
    return linear(out, attn.proj) if attn.project_all else out


def rewritten_attention(attn: PartialAttention, x: Tensor, scored: Tensor) -> Tensor:
    b, d, h, w = x.shape
    num = min(max(1, math.floor(attn.fraction * h * w)), h * w - 1)
    images = []
    for tokens, token_scores in zip(x.reshape(b, d, -1), scored.reshape(b, d, -1), strict=True):
        c = [sum(token_scores[:, place].tolist()) / d for place in range(h * w)]
        images.append(equations_5_5_to_5_7(attn, tokens.t(), equation_5_4(c), num).t())
    return torch.stack(images).reshape(x.shape)


def assert_same_value_and_gradients(module: nn.Module, rewritten: Tensor, value: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(value, rewritten, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape)
    inputs = [x, *module.parameters()]
    wanted = torch.autograd.grad((rewritten * weight).sum(), inputs)
    got = torch.autograd.grad((value * weight).sum(), inputs)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def places_of(attn: PartialAttention, x: Tensor) -> Tensor:
    return foreground(x, num_foreground(attn.fraction, x.shape[2] * x.shape[3]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_foreground_is_the_first_tokens_of_equation_5_4_with_equals_in_their_places_order(dtype):
    values = [[0.5, -2.0, 3.0, 0.5, 0.0, -0.0, 0.5, -1.0, 3.0], [-1.0, -1.0, -3.0, -1.0, -0.0, 0.0, -0.0, -5.0, -1.0]]
    x = torch.tensor(values, dtype=dtype).view(2, 1, 3, 3).expand(-1, 4, -1, -1)
    for count in range(9):
        assert foreground(x, count).sort().values.tolist() == [sorted(equation_5_4(c)[:count]) for c in values]


def test_a_plain_picture_has_its_first_tokens_for_foreground_whatever_the_size():
    for side in (2, 14, 56):
        x = torch.full((2, 3, side, side), 0.7)
        assert foreground(x, side).sort().values.tolist() == [list(range(side))] * 2


def test_scores_that_differ_by_rounding_errors_alone_count_as_equal():
    """The brightest part of a picture is plain: its tokens are taken by their places."""
    noise = 1e-6 * torch.randn(8, 1, 14, 14, generator=torch.Generator().manual_seed(4))
    x = (torch.full((8, 16, 14, 14), 0.7) + noise).index_fill(3, torch.tensor([0]), -0.4)
    assert foreground(x, 20).sort().values.tolist() == [[*range(1, 14), *range(15, 22)]] * 8


def test_a_map_of_zeros_has_a_foreground():
    assert foreground(torch.zeros(1, 4, 3, 3), 2).sort().values.tolist() == [[0, 1]]


def test_the_score_is_summed_in_float32_where_the_map_is_bfloat16():
    """Means that differ by less than bfloat16 can hold."""
    x = torch.ones(1, 64, 1, 3, dtype=torch.bfloat16)
    x[0, 0, 0, 1], x[0, 0, 0, 2] = 1.0625, 1.125
    assert [foreground(x, count).sort().values.tolist() for count in (1, 2)] == [[[2]], [[1, 2]]]


@pytest.mark.parametrize(
    ("fraction", "tokens", "wanted"),
    [
        (1 / 64, 3136, 49),
        (1 / 64, 16384, 256),
        (1 / 4, 49, 12),
        (1 / 64, 4, 1),
        (0.99, 2, 1),
        (0.999, 10, 9),
        (0.5, 1, 0),
    ],
)
def test_the_foreground_is_a_fraction_of_the_tokens_but_never_none_and_never_all(fraction, tokens, wanted):
    assert num_foreground(fraction, tokens) == wanted


def test_without_the_mixing_of_heads_foreground_attention_is_equations_5_1_and_5_2():
    attn = attention(head_expansion=1)
    eye = torch.eye(3, dtype=torch.float64)
    attn.before.weight.data, attn.after.weight.data = eye, eye[[1, 2, 0]].t() @ eye[[1, 2, 0]]
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    heads = []
    for head in range(3):
        q, k, v = (part[..., 4 * head : 4 * head + 4] for part in linear(x, attn.qkv).chunk(3, dim=2))
        heads.append(softmax(q @ k.transpose(1, 2) / math.sqrt(4)) @ v)  # Eq. 5.2
    wanted = linear(torch.cat(heads, dim=2), attn.proj)  # Eq. 5.1
    got = attn.mix_foreground(attn.qkv(x.transpose(1, 2)[..., None])[..., 0].transpose(1, 2))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view(got.shape)
    inputs = [x, attn.qkv.weight, attn.qkv.bias, attn.proj.weight]
    ours, theirs = (torch.autograd.grad((out * weight).sum(), inputs) for out in (got, wanted))
    for mine, rewritten in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, rewritten, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sqa_order", ["printed", "query_first"])
@pytest.mark.parametrize("out_proj", ["foreground", "all"])
@pytest.mark.parametrize(("height", "width"), [(4, 5), (1, 2), (1, 1)])
def test_attention_is_equations_5_4_to_5_7(sqa_order, out_proj, height, width):
    attn = attention(out_proj=out_proj, sqa_order=sqa_order)
    x, scored = random_map(12, height, width), random_map(12, height, width, seed=7)
    got = attn(x, places_of(attn, scored))
    assert_same_value_and_gradients(attn, rewritten_attention(attn, x, scored), got, x)


@pytest.mark.parametrize("sqa_order", ["printed", "query_first"])
def test_attention_is_the_equations_where_scores_are_equal_across_the_cut(sqa_order):
    attn = attention(sqa_order=sqa_order)
    x = random_map(12, 3, 4)
    scored = torch.tensor([2.0, 1, 1, 0, 1, 3, 1, 1, 0, 1, 1, 1], dtype=torch.float64).view(1, 1, 3, 4)
    scored = scored.expand(2, 12, -1, -1)
    assert places_of(attn, scored).sort().values.tolist() == [[0, 1, 5]] * 2
    assert_same_value_and_gradients(attn, rewritten_attention(attn, x, scored), attn(x, places_of(attn, scored)), x)


@pytest.mark.parametrize("mlp_kernel", [3, 0])
def test_block_is_figure_5_3(mlp_kernel):
    """The gradient of its input is that of the values alone: the score chooses, and the rewriting has it as numbers."""
    block = randomise(PartialFormerBlock(tiny_config(mlp_kernel=mlp_kernel), 1, drop_path_rate=0.1))
    x_in = random_map(12, 5, 4)
    x = x_in + conv(x_in, block.peg)
    y = x + rewritten_attention(block.attn, map_norm(x, block.norm1), x)
    hidden = conv(map_norm(y, block.norm2), block.mlp.fc1)
    hidden = gelu(conv(hidden, block.mlp.mixer[0]) if mlp_kernel else hidden)
    assert_same_value_and_gradients(block, y + conv(hidden, block.mlp.fc2), block(x_in), x_in)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "patch"])
def test_every_stem_gives_a_quarter_of_the_sides_and_pads_with_zeros(kind):
    stem = randomise(Stem(3, 8, kind))
    for height, width in [(32, 40), (33, 62), (35, 37)]:
        x = random_map(3, height, width)
        wider = F.pad(x, (0, 8, 0, 8))
        out = stem(x)
        assert out.shape == (2, 8, math.ceil(height / 4), math.ceil(width / 4))
        if kind == "patch":
            torch.testing.assert_close(out, stem(wider)[:, :, : out.shape[2], : out.shape[3]])


def num_params(name: str, **changes) -> float:
    """In millions."""
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **changes).parameters()) / 1e6


def count(name: str, **changes) -> tuple[float, float]:
    """M parameters and G multiply-adds."""
    with torch.device("meta"):
        model, images = create_model(name, **changes).eval(), torch.empty(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


TABLE_5_1 = {"b0": (5.3, 0.4), "b1": (8.2, 0.7), "b2": (21.1, 1.9), "b3": (36.1, 3.4), "b4": (64.5, 6.8)}
OTHER_READINGS = {
    "four times the heads, half the foreground": (
        {"head_expansion": 4, "reduction": 32, "foreground_fractions": [1 / 128, 1 / 32, 1 / 8, 1 / 4]},
        [(5.297, 0.413), (8.240, 0.715), (21.098, 1.904), (36.146, 3.349), (64.541, 6.792)],
    ),
    "one conv for a stem, all tokens projected": (
        {"stem": "patch", "out_proj": "all"},
        [(5.287, 0.414), (8.230, 0.717), (21.080, 1.931), (36.107, 3.394), (64.468, 6.847)],
    ),
    "MAT's stem": (
        {"stem": "depthwise"},
        [(5.289, 0.401), (8.234, 0.692), (21.089, 1.852), (36.124, 3.252), (64.507, 6.569)],
    ),
    "reduction 16": (
        {"reduction": 16},
        [(5.302, 0.416), (8.260, 0.719), (21.156, 1.914), (36.250, 3.364), (64.728, 6.823)],
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_counts_that_a_header_states_round_to_table_5_1(name):
    """That they are the model's, every yaml's test holds."""
    text = (conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^# (\w+): ([\d.]+)$", text, flags=re.MULTILINE))
    params, macs = int(stated["parameters"]) / 1e6, float(stated["macs_g"])
    assert (round(params, 1), round(macs, 1)) == TABLE_5_1[name[-2:]]


@pytest.mark.parametrize("reading", OTHER_READINGS)
@pytest.mark.parametrize("size", [0, *(pytest.param(size, marks=pytest.mark.slow) for size in range(1, 5))])
def test_the_other_readings_have_their_counts(size, reading):
    """Parameters may be those of 8 hidden channels where d // r is fewer."""
    changes, wanted = OTHER_READINGS[reading]
    params, macs = count(SIZES[size], **changes)
    assert params == pytest.approx(wanted[size][0], abs=0.013)
    assert macs == pytest.approx(wanted[size][1], rel=0.005)


@pytest.mark.parametrize("name", SIZES)
def test_neither_the_texts_mlp_nor_its_head_has_the_parameters_of_table_5_1(name):
    for changes in ({"mlp_kernel": 0}, {"head_width": 0}):
        assert round(num_params(name, **changes), 1) < TABLE_5_1[name[-2:]][0]


def test_one_attention_costs_what_section_5_3_3_says():
    """40.1 M for 56×56 tokens, 64 channels and 8 heads by Eq. 5.8 to 5.10, whose small terms are not the products'
    own: 3·N_B·d counts a third one in SQA, 2·e·h²·d·N_F has d for N_F."""
    with torch.device("meta"):
        attn = PartialAttention(
            64, 8, fraction=1 / 64, head_expansion=1, reduction=24, out_proj="foreground", sqa_order="printed"
        )
        x = torch.empty(1, 64, 56, 56)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        attn(x, places_of(attn, x))
    assert counter.get_total_flops() / 2e6 == pytest.approx(40.1, rel=0.01)


def test_the_query_first_is_the_same_network_with_a_sixth_fewer_products():
    wanted, changed = count("partialformer_b4"), count("partialformer_b4", sqa_order="query_first")
    assert changed[0] == wanted[0]
    assert changed[1] == pytest.approx(5.648, abs=5e-4)
    model = create_model("partialformer_nano", num_classes=10).double().eval()
    other = create_model("partialformer_nano", num_classes=10, sqa_order="query_first").double().eval()
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    torch.testing.assert_close(other(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (384, 384), (192, 320), (33, 130), (32, 32)])
@torch.no_grad()
def test_any_image_size_works_and_each_map_has_the_ceiling_of_size_over_stride(height, width):
    model = tiny_config().build(10).eval()
    x = torch.randn(2, 3, height, width)
    assert model(x).isfinite().all()
    pyramid = model.pyramid(x)
    assert pyramid.strides == (4, 8, 16, 32)
    for level, stride, channels in zip(pyramid.maps, pyramid.strides, model.config.widths, strict=True):
        assert level.shape == (2, channels, math.ceil(height / stride), math.ceil(width / stride))


@pytest.mark.parametrize("changes", [{}, {"out_proj": "all"}, {"sqa_order": "query_first"}, {"head_width": 0}])
def test_every_convolution_and_norm_reads_a_channels_last_map(changes):
    model = tiny_config(**changes).build(10).to(memory_format=torch.channels_last).train()
    seen = []

    def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last) or inputs[0].ndim != 4)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_pre_hook(look)
    model(torch.randn(2, 3, 72, 56).contiguous(memory_format=torch.channels_last))
    assert len(seen) > 40
    assert all(seen)


OPTIONS = [
    {"out_proj": "all", "stem": "depthwise"},
    {"sqa_order": "query_first", "head_expansion": 2},
    {"sqa_order": "query_first", "out_proj": "all", "stem": "patch", "mlp_kernel": 0, "head_width": 0},
]


@pytest.mark.parametrize("changes", OPTIONS)
@pytest.mark.parametrize("side", [72, 32])
def test_every_option_trains_in_bfloat16_autocast_with_a_single_token_too(changes, side):
    model = tiny_config(**changes).build(10).to(memory_format=torch.channels_last).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(4, 3, side, side)).float().square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.slow  # of the default options test_every_family.py shows it
@pytest.mark.compile
@pytest.mark.parametrize("changes", OPTIONS)
def test_every_option_is_one_graph(changes):
    model = tiny_config(**changes).build(10).to(memory_format=torch.channels_last).train()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    compiled(torch.randn(4, 3, 72, 56)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_drop_path_rises_linearly_over_all_blocks_from_0():
    model = tiny_config(depths=[1, 2, 1, 1], drop_path_rate=0.2).build(10)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [8, 12, 16]}, "model.widths must be 4 numbers"),
        ({"depths": [1, 0, 1, 1]}, "model.depths must be 4 numbers of at least 1"),
        ({"widths": [9, 12, 16, 24], "num_heads": [3, 3, 4, 6]}, "model.widths must start with an even number"),
        ({"num_heads": [2, 5, 4, 6]}, "model.num_heads must divide model.widths"),
        ({"foreground_fractions": [0.1, 0.1, 0.1]}, "model.foreground_fractions must be 4 numbers between 0 and 1"),
        ({"foreground_fractions": [0.1, 0.1, 0.1, 1.0]}, "model.foreground_fractions must be 4 numbers between 0"),
        ({"head_expansion": 0}, "model.head_expansion must be at least 1; got 0"),
        ({"reduction": 0}, "model.reduction must be at least 1; got 0"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be at least 1; got 0"),
        ({"peg_kernel": 4}, "model.peg_kernel must be odd; got 4"),
        ({"peg_kernel": -1}, "model.peg_kernel must be odd; got -1"),
        ({"mlp_kernel": 2}, "model.mlp_kernel must be odd, or 0 for none; got 2"),
        ({"head_width": -1}, "model.head_width must be at least 0; got -1"),
        ({"out_proj": "some"}, r"model.out_proj=some is not known.*foreground, all"),
        ({"sqa_order": "first"}, r"model.sqa_order=first is not known.*printed, query_first"),
        ({"stem": "pool"}, r"model.stem=pool is not known.*conv, depthwise, patch"),
        ({"drop_path_rate": 1.0}, r"model.drop_path_rate must be in \[0, 1\); got 1.0"),
    ],
)
def test_an_impossible_value_is_refused_by_its_name(change, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**change)


def test_every_size_has_its_experiment_with_the_recipe_that_is_stated():
    names = sorted(file.stem for file in (conf_dir() / "experiment").glob("partialformer_*.yaml"))
    assert names == [f"{name}_300e" for name in SIZES]
    for name in names:
        problems = Problems()
        run = resolve_run(plain(compose("train", [f"experiment={name}"])), problems)
        problems.raise_if_any()
        assert run is not None
        assert f"{run.model.name}_300e" == name == run.run.name
        rate = run.optim.base_lr * run.trainer.global_batch / run.optim.lr_per_images
        assert (rate, run.optim.weight_decay, run.schedule.epochs) == (pytest.approx(1e-3), 0.005, 300)
