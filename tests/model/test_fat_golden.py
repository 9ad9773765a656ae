"""FAT against the authors' code: a tiny net's values and gradients, B0's names and shapes, every size's count."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fat_train import create_model
from fat_train.model.fat import FAT, FATConfig

# The golden file names no labels: of all pairs of classes these alone give its cross entropy to 1e-9.
GOLDEN_LABELS = (3, 7)


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Mapping[str, np.ndarray]:
    with np.load(shared_dir / "reference" / "fat_tiny_golden.npz") as archive:
        return dict(archive)


def build_tiny(golden: Mapping[str, np.ndarray], dtype: torch.dtype) -> FAT:
    model = FATConfig(name="tiny", widths=[16, 24, 32, 48], depths=[1, 2, 2, 1], num_heads=[2, 3, 4, 6]).build(10)
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden if key.startswith("state/")}
    model.load_state_dict(state)
    return model.to(dtype)


def images(golden: Mapping[str, np.ndarray], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(golden["input"]).to(dtype)


def assert_close(actual: Tensor, expected: np.ndarray, relative: float) -> None:
    """Against the largest number of the array: single entries may be near 0."""
    reference = torch.from_numpy(expected).double()
    assert (actual.double() - reference).abs().max() <= relative * reference.abs().max()


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_logits_and_features_are_those_of_the_authors_code(golden, dtype, relative, channels_last):
    model = build_tiny(golden, dtype).eval()
    x = images(golden, dtype)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_close(model(x), golden["eval/logits"], relative)
        x = model.embed(x)
        assert_close(x, golden["eval/stem"], relative)
        for stage in range(4):
            x = model.run_stage(stage, x).next
            assert_close(x, golden[f"eval/stage{stage}"], relative)


def test_first_attention_is_that_of_the_authors_code(golden):
    fasa = build_tiny(golden, torch.float64).eval().layers[0].blocks[0].attn
    with torch.no_grad():
        assert_close(fasa(torch.from_numpy(golden["eval/fasa0_in"])), golden["eval/fasa0_out"], 1e-9)


@pytest.mark.parametrize(
    # The file holds gradients in float32: they cannot be met closer than its rounding.
    ("dtype", "relative", "gradient_relative"),
    [(torch.float64, 1e-9, 2**-23), (torch.float32, 1e-4, 1e-4)],
)
def test_a_training_steps_loss_and_gradients_are_those_of_the_authors_code(golden, dtype, relative, gradient_relative):
    model = build_tiny(golden, dtype).train()
    logits = model(images(golden, dtype))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN_LABELS))
    loss.backward()
    assert_close(logits.detach(), golden["train/logits"], relative)
    assert_close(loss.detach(), golden["train/loss"], relative)

    expected = {key.removeprefix("train/grad/"): golden[key] for key in golden if key.startswith("train/grad/")}
    assert dict(model.named_parameters()).keys() == expected.keys()
    # Biases before a BatchNorm and of the keys have gradient 0; what is left of them is rounding, not a number to meet.
    rounding = relative * max(np.abs(gradient).max() for gradient in expected.values())
    for name, parameter in model.named_parameters():
        reference = torch.from_numpy(expected[name]).double()
        difference = (parameter.grad.double() - reference).abs().max()
        assert difference <= gradient_relative * reference.abs().max() + rounding, name


def test_names_and_shapes_of_b0_are_those_of_the_released_checkpoints(shared_dir):
    lines = (shared_dir / "reference" / "fat_b0_released_keys.txt").read_text().splitlines()
    released = [(name, ast.literal_eval(shape)) for name, shape in (line.split("\t") for line in lines)]
    ours = [(name, tuple(tensor.shape)) for name, tensor in create_model("fat_b0").state_dict().items()]
    assert ours == released


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("fat_b0", 4_494_488),
        ("fat_b1", 7_819_720),
        ("fat_b2", 13_466_728),
        ("fat_b3", 29_196_264),
        ("fat_b3_st", 29_321_896),
    ],
)
def test_parameter_counts_are_those_of_the_authors_code_to_the_unit(name, parameters):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
