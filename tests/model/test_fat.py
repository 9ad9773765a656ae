"""FAT's equations written again, its config's refusals, and the sizes of its maps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat_train.model.fat import FASA, ConvFFN, FATBlock, FATConfig, FineGrainedPool, InteractionConfig
from fat_train.types import UserError

TINY = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 2, 1, 1], "num_heads": [2, 3, 4, 6]}


def tiny_config(**changes) -> FATConfig:
    return FATConfig(**(TINY | changes))


def randomise(module: nn.Module) -> nn.Module:
    """Weights, affine terms and running statistics away from 0 and 1, where mistakes would hide."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        tensor.data = 0.2 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return module.eval()


def conv(x: Tensor, layer: nn.Conv2d) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, groups=layer.groups)


def batch_norm(x: Tensor, layer: nn.BatchNorm2d) -> Tensor:
    mean, var, weight, bias = (
        t[:, None, None] for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


def layer_norm(x: Tensor, layer: nn.GroupNorm) -> Tensor:
    mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def equations_6_to_11(fasa: FASA, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    pool = batch_norm(conv(x, fasa.pool.conv0), fasa.pool.bn0)  # Eq. 6, one base unit and the last DWConv
    pool = batch_norm(conv(conv(pool, fasa.pool.linear0), fasa.pool.conv1), fasa.pool.bn1)
    q, kv = conv(x, fasa.q), conv(pool, fasa.kv).reshape(b, 2, fasa.num_heads, c // fasa.num_heads, -1)
    queries = q.reshape(b, fasa.num_heads, c // fasa.num_heads, h * w)
    scores = torch.einsum("bmdi,bmdj->bmij", queries, kv[:, 0]) / math.sqrt(c // fasa.num_heads)
    weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
    global_ = torch.einsum("bmij,bmdj->bmdi", weights, kv[:, 1]).reshape(b, c, h, w)  # Eq. 7
    q_prime = conv(q, fasa.local_mixer)
    local = q_prime * sigmoid(q_prime)  # Eq. 8
    gated_local = local * sigmoid(global_)  # Eq. 9
    gated_global = global_ * (sigmoid(local) if fasa.gate == "paper" else 1)  # Eq. 10
    return conv(gated_global * gated_local, fasa.mixer)  # Eq. 11


def assert_same_value_and_gradients(module: nn.Module, rewritten: Tensor, value: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(value, rewritten, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view_as(value)
    wanted = torch.autograd.grad((rewritten * weight).sum(), [x, *module.parameters()])
    got = torch.autograd.grad((value * weight).sum(), [x, *module.parameters()])
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def random_map(channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("gate", ["released", "paper"])
def test_fasa_is_equations_6_to_11(gate):
    fasa = randomise(FASA(width=6, num_heads=2, kernel_size=5, kv_reduction=4, gate=gate))
    x = random_map(6, 9, 7)
    assert_same_value_and_gradients(fasa, equations_6_to_11(fasa, x), fasa(x), x)


def test_the_papers_gate_multiplies_by_the_last_factor_of_equation_11():
    fasa = randomise(FASA(width=4, num_heads=2, kernel_size=3, kv_reduction=1, gate="released"))
    fasa.mixer = nn.Identity()
    q_prime, global_ = random_map(4, 3, 3), random_map(4, 3, 3).flip(0)
    released = fasa.interact(q_prime, global_)
    fasa.gate = "paper"
    local = q_prime * sigmoid(q_prime)
    torch.testing.assert_close(fasa.interact(q_prime, global_), released * sigmoid(local))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_ffn_adds_its_depthwise_conv_in_a_stage_and_replaces_by_it_at_the_end(stride):
    ffn = randomise(ConvFFN(width=3, out_width=5, ratio=2, stride=stride))
    x = random_map(3, 5, 4)
    hidden = conv(x, ffn.fc1)  # before the activation
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    hidden = conv(hidden, ffn.dwconv) + (hidden if stride == 1 else 0)
    assert_same_value_and_gradients(ffn, conv(batch_norm(hidden, ffn.bn), ffn.fc2), ffn(x), x)


@pytest.mark.parametrize("downsamples", [False, True])
def test_block_is_equation_1(downsamples):
    block = randomise(FATBlock(tiny_config(), 1, downsamples=downsamples, drop_path_rate=0.1))
    x_in = random_map(12, 6, 5)
    x = conv(x_in, block.cpe) + x_in
    y = block.attn(layer_norm(x, block.norm1)) + x
    shortcut = y
    if downsamples:
        shortcut = conv(batch_norm(conv(y, block.downsample[0]), block.downsample[1]), block.downsample[2])
    z = block.ffn(layer_norm(y, block.norm2)) + shortcut
    got_y, got_z = block(x_in)
    torch.testing.assert_close(got_y, y, rtol=1e-10, atol=1e-10)
    assert_same_value_and_gradients(block, z, got_z, x_in)


def test_pool_of_reduction_1_is_the_identity():
    pool = FineGrainedPool(4, reduction=1)
    x = random_map(4, 5, 5)
    assert pool(x) is x
    assert not list(pool.parameters())


def test_drop_path_rises_linearly_over_all_blocks_from_0():
    model = tiny_config(depths=[1, 2, 1, 1], drop_path_rate=0.2).build(10)
    rates = [block.drop_path.drop_prob for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_drop_path_skips_branches_in_training_alone():
    model = tiny_config(drop_path_rate=0.5).build(10)
    x = torch.randn(4, 3, 32, 32)
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(("height", "width"), [(96, 64), (97, 65), (224, 224), (33, 130)])
def test_any_image_size_works_and_each_map_has_the_ceiling_of_size_over_stride(height, width):
    model = tiny_config().build(10).eval()
    with torch.no_grad():
        pyramid = model.pyramid(torch.zeros(1, 3, height, width))
        assert model(torch.zeros(1, 3, height, width)).shape == (1, 10)
    assert pyramid.strides == (4, 8, 16, 32)
    for level, stride, channels in zip(pyramid.maps, pyramid.strides, model.config.widths, strict=True):
        assert level.shape == (1, channels, math.ceil(height / stride), math.ceil(width / stride))


def test_the_map_of_a_stride_is_the_last_one_before_the_down_sampling():
    model = tiny_config().build(10).eval()
    entering: dict[str, Tensor] = {}
    names = ["layers.0.blocks.0.norm2", "layers.1.blocks.1.norm2", "layers.2.blocks.0.norm2", "norm"]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: entering.update({name: args[0]}))
    with torch.no_grad():
        pyramid = model.pyramid(torch.randn(1, 3, 64, 64))
    assert [info["module"] for info in model.feature_info] == names
    for name, level in zip(names, pyramid.maps, strict=True):
        assert torch.equal(entering[name], level)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": [8, 12, 16]}, "model.widths must be 4 numbers"),
        ({"depths": [1, 0, 1, 1]}, "model.depths must be 4 numbers of at least 1"),
        ({"widths": [9, 12, 16, 24], "num_heads": [3, 3, 4, 6]}, "model.widths must start with an even number"),
        ({"num_heads": [2, 5, 4, 6]}, "model.num_heads must divide model.widths"),
        ({"kernel_sizes": [3, 4, 7, 9]}, "model.kernel_sizes must be odd"),
        ({"kv_reductions": [6, 4, 2, 1]}, "model.kv_reductions must be powers of two"),
        ({"drop_path_rate": 1.0}, r"model.drop_path_rate must be in \[0, 1\); got 1.0"),
        ({"drop_path_rate": -0.1}, "model.drop_path_rate must be in"),
    ],
)
def test_an_impossible_value_is_refused_by_its_name(change, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**change)


def test_an_unknown_gate_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"model\.interaction\.gate must be one of released, paper; got both"):
        InteractionConfig(gate="both")
