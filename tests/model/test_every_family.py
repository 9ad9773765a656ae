"""What every family of models promises, shown on its smallest: a yaml `<family>_nano` is found by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from fat_train import create_model, list_models
from fat_train.model.backbone import Backbone
from fat_train.op.choice import REFERENCE, OpConfig, using

NANOS = list_models("*_nano")
AUTO = OpConfig()
SIDES = [(64, 64), (72, 56), (96, 160)]

every_family = pytest.mark.parametrize("name", NANOS)


def build(name: str, num_classes: int = 10, **changes) -> Backbone:
    torch.manual_seed(0)
    model = create_model(name, num_classes=num_classes, **changes)
    assert isinstance(model, Backbone)
    return model.to(memory_format=torch.channels_last)


def images(height: int = 64, width: int = 64, batch: int = 4) -> Tensor:
    x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits and every gradient, and the buffers afterwards."""
    torch.manual_seed(3)
    logits = model(x)
    logits.float().square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    floating = {key: buffer for key, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {"logits": logits.detach(), **gradients, **floating}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float = 1e-4) -> None:
    """Each against its own largest number; gradients that are 0 in truth, such as of biases before a BatchNorm, against
    what rounding leaves of the largest of all."""
    assert ours.keys() == theirs.keys()
    largest = max(theirs[key].abs().max() for key in theirs if key != "logits" and "running" not in key)
    for key, wanted in theirs.items():
        allowed = relative * (wanted.abs().max() + 0.05 * largest)
        assert (ours[key] - wanted).abs().max() <= allowed, key


def used(model: Backbone) -> Backbone:
    """With weights and running statistics that are not those of the first moment."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(3):
            model.train()(images())
    return model.eval()


@every_family
def test_every_parameter_gets_a_finite_gradient_and_no_weight_gets_none(name):
    found = step(build(name).train(), images())
    assert [key for key, tensor in found.items() if not tensor.isfinite().all()] == []
    weights = [key for key, parameter in build(name).named_parameters() if parameter.ndim > 1]
    assert [key for key in weights if not found[key].abs().max() > 0] == []


@every_family
@pytest.mark.parametrize(("height", "width"), SIDES)
@torch.no_grad()
def test_any_image_size_gives_the_maps_that_feature_info_states(name, height, width):
    model = build(name).eval()
    x = images(height, width, batch=2)
    assert model(x).shape == (2, 10)
    pyramid = model.pyramid(x)
    assert list(pyramid.strides) == [level["reduction"] for level in model.feature_info]
    for level, info in zip(pyramid.maps, model.feature_info, strict=True):
        sides = [-(-side // info["reduction"]) for side in (height, width)]
        assert level.shape == (2, info["num_chs"], *sides)
        assert level.is_contiguous(memory_format=torch.channels_last)


@every_family
def test_images_of_other_sizes_train_too(name):
    model = build(name).train()
    for height, width in SIDES:
        assert all(tensor.isfinite().all() for tensor in step(model, images(height, width, batch=2)).values())


@every_family
@torch.no_grad()
def test_an_image_is_classified_alike_whatever_it_is_batched_with(name):
    model, x = used(build(name)), images()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-4, atol=1e-5)


@every_family
def test_forward_is_the_head_on_the_features(name):
    model, x = used(build(name)), images()
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape[1] == model.num_features
        assert torch.equal(model(x), model.forward_head(features))
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (4, model.head_hidden_size)
        assert torch.equal(model(x), model.get_classifier()(pooled))
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)
        assert build(name, num_classes=0, global_pool="").eval()(x).ndim == 4


@every_family
def test_a_feature_extractor_has_no_idle_parameter_and_gives_the_same_maps(name):
    levels = len(build(name).feature_info)
    for kept in {(0,), (levels - 1,), tuple(range(levels))}:
        whole, extractor = build(name).train(), build(name, features_only=False).train()
        extractor.prune_intermediate_layers(list(kept), prune_norm=True)
        torch.manual_seed(3)
        wanted = whole.forward_intermediates(images(), list(kept), intermediates_only=True)
        torch.manual_seed(3)
        maps = extractor.forward_intermediates(images(), list(kept), intermediates_only=True)
        assert all(map(torch.equal, maps, wanted))
        sum(level.square().mean() for level in maps).backward()
        assert [key for key, parameter in extractor.named_parameters() if parameter.grad is None] == []
    assert len(create_model(name, features_only=True).eval()(images())) == levels


@every_family
def test_drop_path_grows_with_depth_and_is_off_in_evaluation(name):
    model = build(name, drop_path_rate=0.5)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.5)
    still = build(name, drop_path_rate=0.0)
    still.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(images()), still.eval()(images()))
    assert not torch.equal(step(model.train(), images())["logits"], step(still.train(), images())["logits"])


@every_family
def test_recomputing_activations_changes_neither_gradients_nor_buffers(name):
    plain = build(name, drop_path_rate=0.5).train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    calls = []
    blocks = [module for module in saving.modules() if isinstance(getattr(module, "blocks", None), nn.ModuleList)]
    blocks[0].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    ours, theirs = step(saving, images()), step(plain, images())
    assert len(calls) == 2, "run once and recomputed once"
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@every_family
@pytest.mark.parametrize("training", [True, False])
def test_by_whatever_kernels_and_layout_it_computes_the_same(name, training):
    model = used(build(name)).train(training)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    ours = step(model, images())
    with using(REFERENCE):
        assert_close(ours, step(plain, images().contiguous()))


@every_family
def test_bfloat16_autocast_trains_with_finite_gradients(name):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = step(build(name).train(), images())
    assert found["logits"].dtype == torch.bfloat16
    assert all(tensor.isfinite().all() for tensor in found.values())


@every_family
@torch.no_grad()
def test_reparameterised_it_computes_the_same_without_a_batch_norm(name):
    model = used(build(name))
    whole = copy.deepcopy(model).double()
    folded = copy.deepcopy(whole).reparameterize()
    x = images().double()
    torch.testing.assert_close(folded(x), whole(x), rtol=1e-10, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@every_family
def test_every_parameter_belongs_to_a_depth_from_the_stem_to_the_head(name):
    model = build(name)
    for coarse in (False, True):
        layer_of = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert layer_of.keys() == dict(model.named_parameters()).keys()
        assert layer_of["head.weight"] == max(layer_of.values())
        assert min(layer_of.values()) == 0
        assert len(set(layer_of.values())) == max(layer_of.values()) + 1, "a depth without parameters"
        if not coarse:
            assert len(set(layer_of.values())) > len(model.feature_info)
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay())
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.compile
@every_family
def test_a_training_step_with_drop_path_recomputed_in_bf16_mixed_is_one_graph(name):
    model = build(name, drop_path_rate=0.3).train()
    model.set_grad_checkpointing()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        compiled(images()).float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.compile
@every_family
def test_a_training_step_is_one_graph_that_computes_what_eager_code_does(name):
    eager = build(name).train()
    traced = copy.deepcopy(eager)
    torch.compiler.reset()
    traced.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(step(traced, images()), step(eager, images()))


@pytest.mark.compile
@every_family
@torch.no_grad()
def test_it_is_exported_as_torchs_operations_for_any_batch(name):
    model = used(build(name)).reparameterize()
    torch.compiler.reset()
    with using(REFERENCE):
        sizes = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (images(batch=2),), dynamic_shapes=(sizes,), strict=True)
    for batch in (1, 5):
        torch.testing.assert_close(
            program.module()(images(batch=batch)), model(images(batch=batch)), rtol=1e-4, atol=1e-5
        )
