"""A reparameterised model computes what it computed before, with fewer operations, and cannot be mistaken for it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from timm.layers import GroupNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import fat_train
from fat_train.layer.conv import DepthwiseConv2d, PointwiseConv2d
from fat_train.model.backbone import Backbone
from fat_train.model.fat import FATConfig, InteractionConfig
from fat_train.model.fold import fold
from fat_train.types import UserError

TINY = {"name": "tiny", "widths": [8, 12, 16, 24], "depths": [1, 2, 1, 2], "num_heads": [2, 3, 4, 6]}


def draw_norms(model: nn.Module) -> nn.Module:
    """Statistics and affine terms as training leaves them, away from 0 and 1, where mistakes would hide."""
    generator = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.GroupNorm | _BatchNorm) and norm.weight is not None:
            norm.weight.data = 0.5 + torch.rand(norm.weight.shape, generator=generator)
            norm.bias.data = 0.3 * torch.randn(norm.bias.shape, generator=generator)
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            norm.running_mean = 0.3 * torch.randn(norm.running_mean.shape, generator=generator)
            norm.running_var = 0.3 + torch.rand(norm.running_var.shape, generator=generator)
    return model.eval()


def tiny(**changes) -> Backbone:
    torch.manual_seed(0)
    model = draw_norms(FATConfig(**(TINY | changes)).build(10))
    assert isinstance(model, Backbone)
    return model


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_close(ours: Tensor, theirs: Tensor, relative: float) -> None:
    """Against the largest number: single ones may be near 0."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", ["tiny", "fat_nano", "fat_b0"])
@torch.no_grad()
def test_logits_and_every_map_stay(name, channels_last, dtype, relative):
    model = tiny(drop_path_rate=0.3) if name == "tiny" else draw_norms(fat_train.create_model(name, num_classes=10))
    x = images(dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model = model.to(dtype)
    logits, pyramid = model(x), model.pyramid(x)
    assert model.reparameterize() is model
    assert_close(model(x), logits, relative)
    for ours, theirs in zip(model.pyramid(x).maps, pyramid.maps, strict=True):
        assert_close(ours, theirs, relative)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("gate", ["released", "paper"])
@torch.no_grad()
def test_either_gate_stays(gate):
    model = tiny(interaction=InteractionConfig(gate=gate)).double()
    logits = model(images(torch.float64))
    assert_close(model.reparameterize()(images(torch.float64)), logits, 1e-10)


def test_no_batch_norm_and_no_sum_with_a_convolutions_input_is_left():
    model = tiny(drop_path_rate=0.3).train().reparameterize()
    assert not any(isinstance(module, _BatchNorm) for module in model.modules())
    assert not any(module.residual for module in model.modules() if isinstance(module, DepthwiseConv2d))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_weights_stay_channels_last():
    model = tiny().to(memory_format=torch.channels_last).reparameterize()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convs)


def test_a_second_call_changes_nothing():
    model = tiny().reparameterize()
    before = copy.deepcopy(model.state_dict())
    modules = list(model.modules())
    model.reparameterize()
    assert list(model.modules()) == modules
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_a_feature_extractor_gives_the_same_maps():
    extractor = draw_norms(fat_train.create_model("fat_nano", features_only=True, out_indices=(1, 3))).double()
    maps = extractor(images(torch.float64))
    extractor.model.reparameterize()
    for ours, theirs in zip(extractor(images(torch.float64)), maps, strict=True):
        assert_close(ours, theirs, 1e-10)


@torch.no_grad()
def test_a_pruned_extractor_and_a_new_head_work_after_it_as_before():
    model = tiny().double()
    pruned = copy.deepcopy(model).reparameterize()
    pruned.prune_intermediate_layers([0, 2])
    x = images(torch.float64)
    wanted = model.forward_intermediates(x, [0, 2], intermediates_only=True)
    for ours, theirs in zip(pruned.forward_intermediates(x, [0, 2], intermediates_only=True), wanted, strict=True):
        assert_close(ours, theirs, 1e-10)
    model.reparameterize().reset_classifier(7)
    assert model(x).shape == (2, 7)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_without():
    """Against float64, over images: what tells them apart is what rounding may hide."""
    model = tiny()
    x = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    exact = copy.deepcopy(model).double()(x.double())

    def error(model: nn.Module) -> float:
        return (model.bfloat16()(x.bfloat16()).double() - exact).square().mean().sqrt().item()

    assert error(copy.deepcopy(model).reparameterize()) <= 1.25 * error(model)


def test_training_is_refused_and_says_what_to_do():
    model = tiny().reparameterize()
    for switch in (model.train, nn.Sequential(model).train):
        with pytest.raises(UserError, match=r"only evaluates.*build it again \(create_model\)"):
            switch()
    assert not any(module.training for module in model.modules())
    model.train(False)
    model.eval()


def test_weights_from_before_are_refused_however_they_are_loaded(tmp_path):
    model = tiny()
    state, file = model.state_dict(), tmp_path / "weights.pth"
    torch.save(state, file)
    folded = copy.deepcopy(model).reparameterize()
    before = copy.deepcopy(folded.state_dict())
    ways = [
        lambda: folded.load_state_dict(state),
        lambda: folded.load_state_dict(state, strict=False),
        lambda: nn.ModuleDict({"net": folded}).load_state_dict({f"net.{name}": state[name] for name in state}),
        lambda: fat_train.load_weights(folded, file),
    ]
    for load in ways:
        with pytest.raises(UserError, match=r"load the weights first, then call reparameterize\(\)"):
            load()
    assert all(torch.equal(folded.state_dict()[name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_its_own_weights_fit_another_reparameterised_model_and_no_other():
    model, other = tiny().reparameterize(), FATConfig(**TINY).build(10)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(model.state_dict())
    other.reparameterize().load_state_dict(model.state_dict())
    assert torch.equal(other(images()), model(images()))


@torch.no_grad()
def test_it_survives_pickling_and_copying():
    model = tiny().reparameterize()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(twin(images()), model(images()))
        with pytest.raises(UserError):
            twin.train()


class Other(nn.Module):
    """What another family may hold."""

    conv_norm_pairs = (("fc", "bn"),)
    norm_conv_pairs = (("norm", "proj"),)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.SyncBatchNorm(8),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.BatchNorm2d(8, affine=False),
            nn.BatchNorm2d(8),
            PointwiseConv2d(8, 8),
            nn.BatchNorm2d(8, track_running_stats=False),
            DepthwiseConv2d(8, 3, residual=True),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            GroupNormAct(8, 2),
            PointwiseConv2d(8, 8, activation="gelu"),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1, groups=2),
            nn.BatchNorm2d(8),
            DepthwiseConv2d(8, 3),
            nn.ReLU(),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(8, track_running_stats=False),
            PointwiseConv2d(8, 8),
            nn.ReLU(),
            nn.BatchNorm2d(8, affine=False),
            PointwiseConv2d(8, 6, activation="gelu", bias=False),
        )
        self.norm = nn.BatchNorm2d(6)
        self.proj = nn.Conv2d(6, 8, 1, stride=2)
        self.fc = nn.Linear(8, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(self.proj(self.norm(self.stem(x))).mean((2, 3))))


@torch.no_grad()
def test_what_stands_beside_no_convolution_that_can_take_it_or_normalises_by_the_batch_stays():
    torch.manual_seed(0)
    module = draw_norms(Other()).double()
    x = images(torch.float64)
    wanted = module(x)
    fold(module)
    assert_close(module(x), wanted, 1e-10)
    left = {index: module.stem[index + 1] for index, step in enumerate(module.stem) if isinstance(step, _BatchNorm)}
    assert list(left) == [6, 9, 12, 17, 20]
    assert isinstance(left[9], GroupNormAct)
    assert left[12].groups == 2
    assert left[17].padding == (1, 1)
    assert [type(norm) for norm in (module.bn, module.norm, module.stem[23])] == [nn.Identity] * 3
    assert all(module.stem[index].bias is not None for index in (0, 24))
