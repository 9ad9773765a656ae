"""MAT's equations written again, the counts that its document prints, its config's refusals, the sizes of its maps."""

from __future__ import annotations

import copy
import math
import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fat_train.config.compose import compose
from fat_train.config.resolve import resolve
from fat_train.config.run import Problems, plain, resolve_run
from fat_train.config.zoo import conf_dir, load_model_node
from fat_train.model.mat import (
    MAT,
    BilinearPatchEmbed,
    ConvPatchEmbed,
    MATAttention,
    MATBlock,
    MATConfig,
    PatchMerging,
    Stem,
    WindowAttention,
)
from fat_train.trainer.plan import plan_run
from fat_train.types import UserError

TINY: dict[str, Any] = {
    "name": "tiny",
    "widths": [4, 6, 8, 12],
    "depths": [1, 1, 2, 1],
    "num_heads": [0, 0, 2, 3],
    "window_size": 3,
    "mlp_ratio": 2,
    "head_width": 10,
}
OPTIONS = [
    {},
    {"token_mixers": ["none", "none", "window", "window"]},
    {"token_mixers": ["none"] * 4, "num_heads": [0] * 4, "mlp_kernel": 0},
    {"token_mixers": ["mat", "window", "none", "mat"], "num_heads": [2, 3, 0, 4]},
    {"cpe_kernel": 0, "head_width": 0},
    {"patch_embed": "conv", "cpe_kernel": 5, "mlp_kernel": 5},
    {"patch_embed": "merging"},
]
SIZES = [f"mat_{number}" for number in range(1, 6)]
EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("mat_*.yaml"))
ROWS = [name for name in EXPERIMENTS if "_table" in name]


def tiny_config(**changes) -> MATConfig:
    return MATConfig(**(TINY | changes))


def randomise(module: nn.Module) -> nn.Module:
    """Weights, affine terms and running statistics away from 0 and 1, where mistakes would hide."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        tensor.data = 0.1 + 0.4 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return module.eval()


def random_map(channels: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64, requires_grad=True)


def assert_same_value_and_gradients(value: Tensor, rewritten: Tensor, wrt: list[Tensor]) -> None:
    torch.testing.assert_close(value, rewritten, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
    wanted = torch.autograd.grad((rewritten * weight).sum(), wrt, retain_graph=True)
    got = torch.autograd.grad((value * weight).sum(), wrt, retain_graph=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    """Of the channels, which are the second axis of a map."""
    mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def batch_norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    mean, var, weight, bias = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(tokens: Tensor, layer: nn.Conv2d, rows: slice = slice(None)) -> Tensor:
    """A 1×1 conv's rows on tokens [n, C]."""
    bias = 0 if layer.bias is None else layer.bias[rows]
    return tokens @ layer.weight[rows, :, 0, 0].T + bias


def equations_1_and_2(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Concat(SA_1, …, SA_h), SA_j = softmax(QKᵀ / √(C/h)) V; q [n, C], k and v [m, C]. Of Eq. 4.3 to 4.5 too."""
    depth, out = q.shape[1] // heads, []
    for j in range(heads):
        own = slice(j * depth, (j + 1) * depth)
        scores = torch.exp(q[:, own] @ k[:, own].T / math.sqrt(depth))
        out.append(scores / scores.sum(1, keepdim=True) @ v[:, own])
    return torch.cat(out, 1)


def windows_of(x: Tensor, side: int) -> list[tuple[slice, slice, Tensor]]:
    """Every window of one image [C, H, W], padded by zeros: where it lies, and its tokens [L, C]."""
    channels, height, width = x.shape
    padded = torch.zeros(channels, height + -height % side, width + -width % side, dtype=x.dtype)
    padded = torch.cat((x, padded[:, :height, width:]), 2)
    padded = torch.cat((padded, torch.zeros(channels, -height % side, padded.shape[2], dtype=x.dtype)), 1)
    return [
        (slice(top, top + side), slice(left, left + side), padded[:, top : top + side, left : left + side].flatten(1).T)
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def mat_attention(layer: MATAttention | WindowAttention, x: Tensor) -> Tensor:
    """Eq. 4.1 to 4.5, image by image, window by window, head by head."""
    images, side, heads, c = [], layer.window_size, layer.num_heads, x.shape[1]
    for image in x:
        windows = windows_of(image, side)
        queries, attended, abstract = [], [], []
        for _, _, tokens in windows:
            q, k, v = (linear(tokens, layer.qkv, slice(i * c, (i + 1) * c)) for i in range(3))
            queries.append(q)
            if isinstance(layer, MATAttention):
                q, k, v = (torch.cat((part, layer.abstract_token[None])) for part in (q, k, v))
            out = equations_1_and_2(q, k, v, heads)
            attended.append(linear(out[: side**2], layer.proj))
            abstract.append(out[side**2 :])
        if isinstance(layer, MATAttention):
            a = torch.cat(abstract)  # [N_w, C]
            q, k, v = (linear(a, layer.mix_qkv, slice(i * c, (i + 1) * c)) for i in range(3))
            mixed = linear(equations_1_and_2(q, k, v, heads), layer.mix_proj)
            k, v = linear(mixed, layer.fuse_kv, slice(c)), linear(mixed, layer.fuse_kv, slice(c, 2 * c))
            attended = [x + equations_1_and_2(q, k, v, heads) for x, q in zip(attended, queries, strict=True)]
        rows: list[Tensor] = []
        across = -(-image.shape[2] // side)
        for start in range(0, len(attended), across):
            rows.append(torch.cat([t.T.unflatten(1, (side, side)) for t in attended[start : start + across]], 2))
        images.append(torch.cat(rows, 1)[:, : image.shape[1], : image.shape[2]])
    return torch.stack(images)


@pytest.mark.parametrize("kind", [MATAttention, WindowAttention])
@pytest.mark.parametrize(("height", "width"), [(6, 9), (3, 3), (4, 8), (2, 1)])
def test_attention_is_equations_4_1_to_4_5_on_whole_and_on_padded_windows(kind, height, width):
    layer, x = randomise(kind(width=6, num_heads=2, window_size=3)), random_map(6, height, width)
    assert_same_value_and_gradients(layer(x), mat_attention(layer, x), [x, *layer.parameters()])


def test_token_abstraction_is_equations_4_1_and_4_2():
    layer = randomise(MATAttention(width=6, num_heads=3, window_size=2))
    q, k, v = (random_map(6, 5, 4, seed) for seed in (1, 2, 3))  # five windows of four tokens
    tokens, abstract = [], []
    for image in range(2):
        of_windows = [
            equations_1_and_2(*(torch.cat((x[image, :, i].T, layer.abstract_token[None])) for x in (q, k, v)), heads=3)
            for i in range(5)
        ]
        tokens.append(torch.stack([out[:4].T for out in of_windows], 1))
        abstract.append(torch.stack([out[4] for out in of_windows], 1)[:, None])
    got_tokens, got_abstract = layer.abstract(q, k, v)
    wrt = [q, k, v, layer.abstract_token]
    assert_same_value_and_gradients(got_tokens, torch.stack(tokens), wrt)
    assert_same_value_and_gradients(got_abstract, torch.stack(abstract), [k, v, layer.abstract_token])


def test_mixing_abstract_tokens_is_equations_4_3_and_4_4():
    layer, a = randomise(MATAttention(width=6, num_heads=2, window_size=2)), random_map(6, 1, 5)
    mixed = []
    for image in a:
        q, k, v = (linear(image[:, 0].T, layer.mix_qkv, slice(i * 6, (i + 1) * 6)) for i in range(3))
        mixed.append(linear(equations_1_and_2(q, k, v, heads=2), layer.mix_proj).T[:, None])
    wrt = [a, *layer.mix_qkv.parameters(), *layer.mix_proj.parameters()]
    assert_same_value_and_gradients(layer.mix(a), torch.stack(mixed), wrt)


def test_token_fusion_is_equation_4_5():
    layer = randomise(MATAttention(width=6, num_heads=2, window_size=2))
    q, mixed = random_map(6, 3, 4), random_map(6, 1, 3, seed=2)
    fused = []
    for queries, tokens in zip(q, mixed, strict=True):
        k, v = (linear(tokens[:, 0].T, layer.fuse_kv, slice(i * 6, (i + 1) * 6)) for i in range(2))
        fused.append(equations_1_and_2(queries.flatten(1).T, k, v, heads=2).T.unflatten(1, (3, 4)))
    assert_same_value_and_gradients(layer.fuse(q, mixed), torch.stack(fused), [q, mixed, *layer.fuse_kv.parameters()])


def sampled(x: Tensor, offset: Tensor) -> Tensor:
    """The four pixels round each moved place, weighed by how near they are; the map goes on as its edge."""
    height, width = x.shape[2:]
    images = []
    for image, (right, down) in zip(x, offset, strict=True):
        places = []
        for i in range(height):
            for j in range(width):
                row, column = (i + down[i, j]).clamp(0, height - 1), (j + right[i, j]).clamp(0, width - 1)
                top, left = min(int(row), max(height - 2, 0)), min(int(column), max(width - 2, 0))
                below, beside = row - top, column - left
                bottom, far = min(top + 1, height - 1), min(left + 1, width - 1)
                upper = image[:, top, left] * (1 - beside) + image[:, top, far] * beside
                lower = image[:, bottom, left] * (1 - beside) + image[:, bottom, far] * beside
                places.append(upper * (1 - below) + lower * below)
        images.append(torch.stack(places, 1).unflatten(1, (height, width)))
    return torch.stack(images)


@pytest.mark.parametrize(("height", "width"), [(8, 6), (7, 9)])
def test_bilinear_patch_embedding_samples_features_at_moved_places(height, width):
    embed, x = randomise(BilinearPatchEmbed(4, 6)), random_map(4, height, width)
    embed.offset[3].weight.data = 2 * torch.tensor([[1.0, -1, 1, -1], [-1, 1, 1, -1]], dtype=x.dtype).view(2, 4, 1, 1)
    offset = conv(gelu(layer_norm(conv(x, embed.offset[0]), embed.offset[1])), embed.offset[3])
    assert offset.min() < -0.5
    assert offset.max() > 0.5
    rewritten = layer_norm(conv(sampled(conv(x, embed.feature), offset), embed.reduction), embed.norm)
    assert_same_value_and_gradients(embed(x), rewritten, [x, *embed.parameters()])


def test_the_other_patch_embeddings_are_a_convolution_and_swins_merging():
    x = random_map(4, 5, 8)
    embed = randomise(ConvPatchEmbed(4, 6))
    assert_same_value_and_gradients(embed(x), layer_norm(conv(x, embed[0]), embed[1]), [x, *embed.parameters()])
    merging = randomise(PatchMerging(4, 6))
    padded = torch.cat((x, torch.zeros(2, 4, 1, 8, dtype=x.dtype)), 2)
    four = torch.cat([padded[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1)
    rewritten = conv(layer_norm(four, merging.norm), merging.reduction)
    assert_same_value_and_gradients(merging(x), rewritten, [x, *merging.parameters()])


@pytest.mark.parametrize("mixer", ["mat", "window", "none"])
@pytest.mark.parametrize(("cpe_kernel", "mlp_kernel"), [(3, 3), (0, 0)])
def test_a_block_is_a_token_mixer_and_a_convolutional_mlp(mixer, cpe_kernel, mlp_kernel):
    heads = 0 if mixer == "none" else 2
    config = tiny_config(token_mixers=[mixer] * 4, num_heads=[heads] * 4, cpe_kernel=cpe_kernel, mlp_kernel=mlp_kernel)
    block, x = randomise(MATBlock(config, stage=1, drop_path_rate=0.1)), random_map(6, 4, 5)
    y = x
    if mixer != "none":
        y = x + conv(x, block.cpe) if cpe_kernel else x
        y = y + mat_attention(block.attn, layer_norm(y, block.norm1))
    hidden = conv(layer_norm(y, block.norm2), block.mlp.fc1)
    hidden = gelu(conv(hidden, block.mlp.mixer[0]) if mlp_kernel else hidden)
    assert_same_value_and_gradients(block(x), y + conv(hidden, block.mlp.fc2), [x, *block.parameters()])


def test_the_stem_is_three_convolutions_with_norms():
    stem, x = randomise(Stem(3, 8)), random_map(3, 9, 14)
    half = gelu(batch_norm(conv(x, stem[0]), stem[1]))
    rewritten = batch_norm(conv(gelu(batch_norm(conv(half, stem[3]), stem[4])), stem[6]), stem[7])
    assert stem(x).shape == (2, 8, 3, 4)
    assert_same_value_and_gradients(stem(x), rewritten, [x, *stem.parameters()])


@pytest.mark.parametrize("head_width", [10, 0])
def test_the_head_widens_the_map_before_its_mean_or_normalises_it(head_width):
    model, x = randomise(tiny_config(head_width=head_width).build(5)), random_map(12, 2, 3)
    wide = layer_norm(x, model.conv_head[0] if head_width else model.norm)
    if head_width:
        wide = gelu(batch_norm(conv(wide, model.conv_head[1]), model.conv_head[2]))
    rewritten = wide.mean((2, 3)) @ model.head.weight.T + model.head.bias
    head = [p for key, p in model.named_parameters() if key.startswith(("norm", "conv_head", "head"))]
    assert_same_value_and_gradients(model.forward_head(model.final_norm(x)), rewritten, [x, *head])


def test_bfloat16_maps_are_sampled_at_float32_places_into_a_channels_last_map():
    x = torch.randn(1, 4, 3, 200).bfloat16().contiguous(memory_format=torch.channels_last)
    still = torch.zeros(1, 2, 3, 200, dtype=torch.bfloat16)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = BilinearPatchEmbed.sample(x, still)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, x, rtol=1e-2, atol=1e-3)


class Copies(TorchDispatchMode):
    """What is copied whole, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.found += [name] * (name in ("clone", "copy_", "_to_copy", "cat", "constant_pad_nd"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "side", "copies"),
    [
        (WindowAttention, 14, ["clone", "clone"]),  # into windows and back
        (MATAttention, 14, ["clone", "cat", "cat", "clone"]),  # and keys and values beside the abstract token's
        (MATAttention, 7, ["cat", "cat"]),
        (MATAttention, 8, ["constant_pad_nd", "clone", "cat", "cat", "clone"]),
    ],
)
@torch.no_grad()
def test_attention_copies_its_map_only_to_sort_it_into_windows(kind, side, copies):
    layer = kind(width=32, num_heads=2, window_size=7)
    x = torch.randn(2, 32, side, side).contiguous(memory_format=torch.channels_last)
    layer(x)
    with Copies() as seen:
        layer(x)
    assert seen.found == copies


@pytest.mark.parametrize("change", OPTIONS, ids=str)
def test_every_option_trains_all_its_parameters_and_folds(change):
    torch.manual_seed(0)
    model = tiny_config(**change).build(5).double().to(memory_format=torch.channels_last)
    x = torch.randn(3, 3, 72, 56, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    model.train()(x).square().mean().backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert idle == []
    pyramid = model.eval().pyramid(x)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in pyramid.maps)
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model).reparameterize()(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.slow  # of the default options test_every_family.py shows it
@pytest.mark.compile
@pytest.mark.parametrize(
    "change",
    [
        {"token_mixers": ["mat", "window", "none", "mat"], "num_heads": [2, 3, 0, 4], "patch_embed": "conv"},
        {"token_mixers": ["none"] * 4, "num_heads": [0] * 4, "patch_embed": "merging", "mlp_kernel": 0},
    ],
    ids=["windows", "mlp"],
)
def test_the_other_options_are_one_graph_with_padded_windows_too(change):
    torch.manual_seed(0)
    model = tiny_config(**change, depths=[1] * 4, drop_path_rate=0.2).build(5).train()
    x = torch.randn(2, 3, 72, 56)
    torch.compiler.reset()
    torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("height", "width"), [(224, 224), (256, 256), (384, 384), (192, 320), (33, 130)])
@torch.no_grad()
def test_any_image_size_works_with_windows_of_seven(height, width):
    model = tiny_config(window_size=7).build(10).eval()
    pyramid = model.pyramid(torch.zeros(1, 3, height, width))
    assert pyramid.strides == (4, 8, 16, 32)
    for level, stride, channels in zip(pyramid.maps, pyramid.strides, TINY["widths"], strict=True):
        assert level.shape == (1, channels, math.ceil(height / stride), math.ceil(width / stride))
    assert model(torch.zeros(1, 3, height, width)).shape == (1, 10)


@torch.no_grad()
def test_the_levels_are_what_the_last_blocks_give():
    model = tiny_config().build(10).eval()
    given: dict[str, Tensor] = {}
    names = [info["module"] for info in model.feature_info]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *all_, name=name: given.update({name: all_[2]}))
    maps = model.pyramid(torch.randn(1, 3, 64, 64)).maps
    assert all(torch.equal(given[name], level) for name, level in zip(names, maps, strict=True))


def test_drop_path_rises_linearly_over_all_blocks_from_0():
    model = tiny_config(drop_path_rate=0.2).build(10)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [4, 6, 8]}, "model.widths must be 4 numbers of at least 1, one a stage; got"),
        ({"depths": [1, 0, 1, 1]}, "model.depths must be 4 numbers of at least 1"),
        ({"widths": [5, 6, 8, 12]}, "model.widths must start with an even number; got"),
        ({"token_mixers": ["mat"]}, "model.token_mixers must be 4 words, one a stage"),
        ({"token_mixers": ["none", "none", "mat", "matt"]}, "model.token_mixers=matt is not known; did you mean mat"),
        ({"num_heads": [0, 2, 2, 3]}, "model.num_heads must be 4 numbers, 0 where model.token_mixers .* has none"),
        ({"num_heads": [0, 0, 0, 3]}, "model.num_heads must be 4 numbers, 0 where"),
        ({"num_heads": [2, 3]}, "model.num_heads must be 4 numbers"),
        ({"num_heads": [0, 0, 3, 3]}, r"model.num_heads must divide model.widths \[4, 6, 8, 12\]; got"),
        ({"num_heads": [0, 0, -2, 3]}, "model.num_heads must divide model.widths"),
        ({"window_size": 0}, "model.window_size must be at least 1; got 0"),
        ({"mlp_ratio": 0}, "model.mlp_ratio must be at least 1; got 0"),
        ({"head_width": -1}, "model.head_width must be at least 0; got -1"),
        ({"cpe_kernel": 2}, "model.cpe_kernel must be odd, or 0 for none; got 2"),
        ({"mlp_kernel": -1}, "model.mlp_kernel must be odd, or 0 for none; got -1"),
        ({"patch_embed": "bilinar"}, "model.patch_embed=bilinar is not known; did you mean bilinear"),
        ({"drop_path_rate": 1.0}, r"model.drop_path_rate must be in \[0, 1\); got 1.0"),
    ],
)
def test_an_impossible_value_is_refused_by_its_name(change, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**change)


def stated(group: str, name: str) -> dict[str, float]:
    text = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")
    return {key: float(value) for key, value in re.findall(r"^# (\w+): ([\d.]+)$", text, flags=re.MULTILINE)}


@cache
def run_of(experiment: str, *words: str) -> Any:
    problems = Problems()
    run = resolve_run(plain(compose("train", [f"experiment={experiment}", *words])), problems)
    problems.raise_if_any()
    return run


def counts(config: MATConfig) -> tuple[int, float, float]:
    """Parameters; 10⁹ multiply-adds; the same by the document's rule, where a number that LayerNorm gives costs 5,
    BatchNorm's 2 and a bilinear sampling's 4."""
    with torch.device("meta"):
        model, image = config.build(1000).eval(), torch.empty(1, 3, 224, 224)
    assert isinstance(model, MAT)
    extra = [0]

    def costs(each: int):
        def count(_: nn.Module, __: Any, out: Tensor) -> None:
            extra[0] += each * out.numel()

        return count

    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_hook(costs(5 if isinstance(module, nn.LayerNorm) else 2))
        if isinstance(module, BilinearPatchEmbed):
            module.feature.register_forward_hook(costs(4))  # as many numbers as are sampled of it
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(image)
    plain_count = counter.get_total_flops() / 2
    return sum(p.numel() for p in model.parameters()), plain_count / 1e9, (plain_count + extra[0]) / 1e9


@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_documents_counts(name):
    said = stated("model", name)
    parameters, _, document_macs_g = counts(resolve(load_model_node(name), where="model"))
    assert parameters / 1e6 == pytest.approx(said["paper_params_m"], rel=1e-4)
    assert document_macs_g == pytest.approx(said["paper_macs_g"], abs=7e-4)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_ablations_has_the_documents_counts(name):
    said = stated("experiment", name)
    parameters, macs_g, document_macs_g = counts(run_of(name).model)
    assert parameters == said["parameters"]
    assert macs_g == pytest.approx(said["macs_g"], abs=5e-4)
    assert parameters / 1e6 == pytest.approx(said["paper_params_m"], abs=8e-4)
    assert document_macs_g == pytest.approx(said["paper_macs_g"], abs=7e-4)


def test_the_ablations_are_those_of_the_document():
    assert [re.sub("mat_2_table", "", name) for name in ROWS] == [
        "4_2_stage_4",
        "4_2_stages_1234",
        "4_2_stages_234",
        "4_9_conv_patch_embed",
        "4_9_patch_merging",
        "4_9_pure_mlp",
        "4_9_window_attention",
    ]


def rates(run: Any) -> tuple[float, float, float]:
    plan = plan_run(run.trainer, run.optim, run.schedule, train_images=1_281_167)
    return plan.lr, plan.warmup_lr, plan.min_lr


def test_the_rates_are_not_scaled_with_the_batch():
    run = run_of("mat_1_300e", "trainer.global_batch=1024")
    assert run.trainer.global_batch == 1024
    assert rates(run) == pytest.approx((1e-3, 1e-7, 1e-6))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_the_documents_recipe(name):
    run = run_of(name)
    assert run.name == name
    assert run.model.name == name[: len("mat_0")]
    assert (run.schedule.epochs, run.schedule.warmup_epochs, run.trainer.global_batch) == (300, 5, 4096)
    assert rates(run) == pytest.approx((1e-3, 1e-7, 1e-6))
    assert (run.optim.weight_decay, run.optim.betas, run.model.drop_path_rate) == (0.05, [0.9, 0.999], 0.05)
    assert (run.augment.mixup_alpha, run.augment.cutmix_alpha, run.augment.erase_prob) == (0.1, 1.0, 0.25)
    assert (run.augment.auto_augment, run.augment.color_jitter) == ("rand-m9-mstd0.5-inc1", 0.4)
    assert (run.loss.label_smoothing, run.callback.ema.decay) == (0.1, 0.0)
