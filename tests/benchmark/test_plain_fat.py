"""The equations as they read, and the model that is trained: one function with one set of names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fat_train import list_models
from fat_train.benchmark.plain_fat import PlainFAT
from fat_train.config.resolve import resolve
from fat_train.config.zoo import load_model_node
from fat_train.model.fat import FATConfig, InteractionConfig

LABELS = torch.tensor([3, 7])


def tiny(gate: str) -> FATConfig:
    return FATConfig(
        name="tiny",
        widths=[8, 12, 16, 24],
        depths=[1, 2, 1, 2],
        num_heads=[2, 3, 4, 6],
        drop_path_rate=0.3,
        interaction=InteractionConfig(gate=gate),
    )


def pair(gate: str) -> tuple[nn.Module, PlainFAT]:
    """The same weights, affine terms and running statistics in both, none of them 0 or 1."""
    ours, plain = tiny(gate).build(10).double(), PlainFAT(tiny(gate), 10).double()
    generator = torch.Generator().manual_seed(0)
    for tensor in [*ours.parameters(), *(value for name, value in ours.named_buffers() if "running" in name)]:
        tensor.data = 0.1 + 0.3 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    return ours, plain


def loss_and_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)  # drop path
    logits = model(x)
    F.cross_entropy(logits, LABELS).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), {**gradients, "images": x.grad}


@pytest.mark.parametrize("gate", ["released", "paper"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_gradients_and_running_statistics_are_those_of_the_model_that_is_trained(gate, training):
    images = torch.randn(2, 3, 47, 66, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, plain = (model.train(training) for model in pair(gate))
    wanted, wanted_gradients = loss_and_gradients(ours, images.clone().requires_grad_())
    got, got_gradients = loss_and_gradients(plain, images.clone().requires_grad_())
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert got_gradients.keys() == wanted_gradients.keys()
    scale = max(gradient.abs().max() for gradient in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(got_gradients[name], gradient, rtol=1e-8, atol=float(1e-9 * scale), msg=name)
    kept = plain.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(kept[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", list_models("fat_*"))
def test_every_size_has_the_same_names_and_shapes_in_the_same_order(name):
    config = resolve(load_model_node(name), where="model")
    with torch.device("meta"):
        ours, plain = config.build(1000).state_dict(), PlainFAT(config, 1000).state_dict()
    assert [(key, value.shape) for key, value in plain.items()] == [(key, value.shape) for key, value in ours.items()]


def test_a_tiny_nets_numbers_are_those_of_the_authors_code(shared_dir: Path):
    with np.load(shared_dir / "reference" / "fat_tiny_golden.npz") as archive:
        golden = {key: torch.from_numpy(value) for key, value in archive.items()}
    config = FATConfig(name="tiny", widths=[16, 24, 32, 48], depths=[1, 2, 2, 1], num_heads=[2, 3, 4, 6])
    plain = PlainFAT(config, 10).double()
    plain.load_state_dict({key.removeprefix("state/"): value for key, value in golden.items() if "state/" in key})
    images = golden["input"].double()
    with torch.no_grad():
        logits = plain.eval()(images)
        torch.testing.assert_close(logits, golden["eval/logits"].double(), rtol=1e-9, atol=1e-9)
    logits, gradients = loss_and_gradients(plain.train(), images.requires_grad_())
    torch.testing.assert_close(logits, golden["train/logits"].double(), rtol=1e-9, atol=1e-9)
    for key, expected in golden.items():
        if key.startswith("train/grad/"):  # kept in float32
            difference = (gradients[key.removeprefix("train/grad/")] - expected).abs().max()
            assert difference <= 2**-23 * expected.abs().max() + 1e-9, key
