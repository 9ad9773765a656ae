"""What every backbone promises, shown on the smallest FAT."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn

from fat_train.model.backbone import Backbone
from fat_train.model.fat import FATConfig
from fat_train.types import UserError


def build(num_classes: int = 10, in_chans: int = 3, **changes) -> Backbone:
    size = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 2, 1, 2], "num_heads": [2, 3, 4, 6]}
    torch.manual_seed(0)
    return FATConfig(**(size | changes)).build(num_classes, in_chans)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_forward_is_the_head_on_the_features(x):
    model = build().eval()
    features = model.forward_features(x)
    assert features.shape == (4, model.num_features, 2, 2)
    assert torch.equal(model(x), model.forward_head(features))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (4, model.head_hidden_size)
    torch.testing.assert_close(pooled, features.flatten(2).mean(2))
    assert torch.equal(model(x), model.get_classifier()(pooled))


def test_intermediates_follow_the_indices_and_end_where_asked(x):
    model = build().eval()
    last, everything = model.forward_intermediates(x)
    assert torch.equal(last, model.forward_features(x))
    assert [level.shape[1] for level in everything] == [8, 12, 16, 24]

    chosen = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    assert all(map(torch.equal, chosen, [everything[0], everything[3]]))
    last_two = model.forward_intermediates(x, indices=2, intermediates_only=True)
    assert all(map(torch.equal, last_two, everything[2:]))
    normed = model.forward_intermediates(x, indices=[3], norm=True, intermediates_only=True)
    assert torch.equal(normed[0], last)

    model.layers[2].register_forward_hook(lambda *_: pytest.fail("ran a stage that nobody asked for"))
    stopped, (level,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert torch.equal(level, everything[1])
    assert stopped.shape == (4, 16, 4, 4)


def test_intermediates_in_another_format_are_refused(x):
    with pytest.raises(UserError, match="output_fmt must be NCHW; got NHWC"):
        build().forward_intermediates(x, output_fmt="NHWC")


def test_pyramid_maps_have_the_channels_and_strides_of_feature_info(x):
    model = build().eval()
    pyramid = model.pyramid(x)
    assert [level.shape[1] for level in pyramid.maps] == [info["num_chs"] for info in model.feature_info]
    assert [64 // level.shape[2] for level in pyramid.maps] == list(pyramid.strides)
    assert list(pyramid.strides) == [info["reduction"] for info in model.feature_info]


def test_reset_classifier_changes_the_width_and_nothing_else(x):
    model = build(10).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head")}
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model.eval()(x.double()).shape == (4, 7)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_without_classes_the_model_gives_its_features(x):
    model = build(num_classes=0).eval()
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (4, 24)
    model.reset_classifier(0, global_pool="")
    assert torch.equal(model(x), model.forward_features(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "num_classes must be at least 0; got -1"),
        ((10, "max"), "global_pool must be"),
        ((10, ""), "set num_classes=0"),
    ],
)
def test_an_impossible_head_is_refused_and_the_old_one_stays(arguments, message):
    model = build(10)
    head = model.get_classifier()
    with pytest.raises(UserError, match=message):
        model.reset_classifier(*arguments)
    assert model.get_classifier() is head
    assert model.num_classes == 10


def test_images_need_not_have_three_channels():
    assert build(in_chans=1).eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    with pytest.raises(UserError, match="in_chans must be at least 1; got 0"):
        build(in_chans=0)


def test_checkpointing_gives_the_gradients_and_buffers_of_a_plain_step(x):
    plain = build(drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    calls = []
    saving.layers[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        torch.manual_seed(3)
        for _ in range(2):
            model(x).square().mean().backward()
    assert len(calls) == 4, "two steps, each block run once and recomputed once"
    for (name, ours), theirs in zip(saving.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)
    for (name, ours), theirs in zip(saving.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert saving.layers[0].blocks[0].ffn.bn.num_batches_tracked == 2
    assert saving.layers[0].blocks[0].ffn.bn.momentum == plain.layers[0].blocks[0].ffn.bn.momentum


def test_checkpointing_can_be_switched_off_again(x):
    model = build().train()
    model.set_grad_checkpointing()
    model.set_grad_checkpointing(False)
    calls = []
    model.layers[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    assert len(calls) == 1


def test_bfloat16_autocast_trains_with_finite_gradients(x):
    model = build().train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x.to(memory_format=torch.channels_last))
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_parameter_belongs_to_a_depth_from_the_stem_to_the_head():
    model = build()
    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert layer_of["patch_embed.conv1.conv.0.weight"] == 0
    assert [layer_of[f"layers.{s}.blocks.{b}.cpe.weight"] for s, b in [(0, 0), (1, 0), (1, 1), (2, 0)]] == [1, 2, 3, 4]
    assert layer_of["norm.weight"] == layer_of["layers.3.blocks.1.cpe.weight"] == 6
    assert layer_of["head.weight"] == 7
    assert max(group_parameters(model, model.group_matcher(coarse=True), reverse=True).values()) == 5


def test_timms_layer_decay_reads_the_model():
    model = build()
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {group["lr_scale"] for group in groups} == {0.5**depth for depth in range(8)}


@pytest.mark.parametrize("indices", [(0,), (0, 2), (1, 3), (0, 1, 2, 3)])
def test_a_pruned_extractor_has_no_idle_parameter_and_gives_the_same_maps(x, indices):
    model = build().train()
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers(list(indices), prune_norm=True) == list(indices)
    assert pruned.num_features == pruned.feature_info[-1]["num_chs"]
    wanted = model.forward_intermediates(x, indices, intermediates_only=True)
    maps = pruned.forward_intermediates(x, indices, intermediates_only=True)
    assert all(map(torch.equal, maps, wanted))
    sum(level.square().mean() for level in maps).backward()
    assert [name for name, parameter in pruned.named_parameters() if parameter.grad is None] == []
