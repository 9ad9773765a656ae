"""FAT by whatever kernels this machine has equals FAT by the operations' definitions: eager, compiled and exported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fat_train import create_model
from fat_train.model.backbone import Backbone
from fat_train.model.fat import FATConfig, InteractionConfig
from fat_train.op.choice import REFERENCE, OpConfig, using

TINY = {"name": "tiny", "widths": [16, 24, 32, 48], "depths": [1, 1, 2, 1], "num_heads": [1, 3, 4, 6]}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
AUTO = OpConfig()


def fat(layout: str = "channels_last", gate: str = "released") -> Backbone:
    torch.manual_seed(0)
    model = FATConfig(**TINY, interaction=InteractionConfig(gate=gate)).build(10)
    return model.to(memory_format=LAYOUTS[layout])


def images(layout: str = "channels_last", batch: int = 3) -> Tensor:
    x = torch.randn(batch, 3, 72, 56, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=LAYOUTS[layout])


def step(config: OpConfig, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, the image's gradient and every parameter's, and the buffers afterwards."""
    x = x.detach().requires_grad_()
    with using(config):
        logits = model(x)
        logits.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    floating = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    return {"logits": logits.detach(), "image": x.grad, **gradients, **floating}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    """Each against its own largest number, and for gradients that are 0 in truth, such as of biases before a BatchNorm,
    against what rounding leaves of the largest of all."""
    assert ours.keys() == theirs.keys()
    largest = max(theirs[name].abs().max() for name in theirs if "running" not in name and name != "logits")
    for name, wanted in theirs.items():
        allowed = relative * (wanted.float().abs().max() + 0.05 * largest)
        assert (ours[name].float() - wanted.float()).abs().max() <= allowed, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gate", ["released", "paper"])
@pytest.mark.parametrize("training", [True, False])
def test_a_step_by_the_fastest_kernels_is_that_by_the_definitions(training, gate, layout):
    model = fat(layout, gate).train(training)
    fast = step(AUTO, copy.deepcopy(model), images(layout))
    assert_close(fast, step(REFERENCE, model, images(layout)), 1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_recomputing_activations_changes_nothing_of_it(training):
    model = fat().train(training)
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    assert_close(step(AUTO, recomputing, images()), step(REFERENCE, model, images()), 1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_autocast_both_round_the_same_numbers(layout):
    """Errors of bfloat16 itself, against float32, are what the two may differ by."""
    model = fat(layout).eval()
    exact = step(REFERENCE, copy.deepcopy(model), images(layout))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, reference = (step(config, copy.deepcopy(model), images(layout)) for config in (AUTO, REFERENCE))

    def error(found: dict[str, Tensor]) -> float:
        return max(((found[n].float() - exact[n]).norm() / exact[n].norm()).item() for n in ("logits", "image"))

    assert fast["logits"].dtype == torch.bfloat16
    assert error(fast) <= 1.5 * error(reference) + 0.01


@pytest.mark.parametrize("config", [AUTO, REFERENCE], ids=["auto", "reference"])
@torch.no_grad()
def test_maps_stay_channels_last_from_the_first_to_the_last(config):
    model = fat().eval()
    with using(config):
        maps = model.pyramid(images()).maps
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in maps)


@pytest.mark.compile
def test_a_training_step_compiles_into_one_graph_that_computes_the_same():
    model = fat().train()
    torch.compiler.reset()
    traced = copy.deepcopy(model)
    traced.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    assert_close(step(AUTO, traced, images()), step(REFERENCE, model, images()), 1e-4)


def folded_nano() -> Backbone:
    torch.manual_seed(0)
    model = create_model("fat_nano", num_classes=10)
    with torch.no_grad():
        for _ in range(3):
            model.train()(images())  # running statistics that are not 0 and 1
    return model.to(memory_format=torch.channels_last).reparameterize()


@pytest.mark.compile
@torch.no_grad()
def test_a_reparameterised_model_compiles_into_one_graph_that_computes_the_same():
    model, x = folded_nano(), images(batch=1)
    wanted = model(x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-5, atol=1e-5)


def operations(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.compile
@torch.no_grad()
def test_by_the_definitions_a_reparameterised_model_is_exported_as_torchs_operations_for_any_batch():
    model = folded_nano()
    torch.compiler.reset()
    with using(REFERENCE):
        sizes = {0: torch.export.Dim("batch", min=1, max=64)}
        program = torch.export.export(model, (images(batch=2),), dynamic_shapes=(sizes,), strict=True)
    assert all(name.startswith(("aten.", "<built-in", "sym_size")) for name in operations(program)), operations(program)
    assert not [name for name in operations(program) if "batch_norm" in name]
    for batch in (1, 5):
        x = images(batch=batch)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.compile
@torch.no_grad()
def test_by_the_fastest_kernels_a_reparameterised_model_is_exported_too():
    model, x = folded_nano(), images(batch=1)
    torch.compiler.reset()
    program = torch.export.export(model, (x,), strict=True)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_on_a_gpu_one_image_is_one_cuda_graph_with_the_same_logits(dtype):
    """`reduce-overhead` records the kernels once and starts them all at a time: an image's latency is launches."""
    exact = folded_nano().double().cuda()
    x = images(batch=1).cuda()
    wanted = exact(x.double())
    model = copy.deepcopy(exact).to(dtype)
    eager = model(x.to(dtype))
    torch.compiler.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for _ in range(4):  # the first calls compile, warm up and record; the last one is played
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(x.to(dtype)).clone()
    allowed = (eager.double() - wanted).abs().max() + 1e-3 * wanted.abs().max()
    assert (logits.double() - wanted).abs().max() <= 2 * allowed


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_on_a_gpu_a_step_by_the_fastest_kernels_is_that_by_the_definitions(training, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    model, x = fat(layout).train(training).cuda(), images(layout).cuda()
    assert_close(step(AUTO, copy.deepcopy(model), x), step(REFERENCE, model, x), 1e-4)
