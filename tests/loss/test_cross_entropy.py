"""The loss of two weighted labels is the cross entropy against their soft target."""

from __future__ import annotations

import pytest
import torch

from fat_train.loss.cross_entropy import CrossEntropyConfig
from fat_train.types import Labels, UserError


def soft_target(labels: Labels, classes: int, smoothing: float) -> torch.Tensor:
    """timm's target, written again: smoothed one-hot rows, mixed."""
    off, on = smoothing / classes, 1 - smoothing + smoothing / classes

    def one_hot(target: torch.Tensor) -> torch.Tensor:
        return torch.full((len(target), classes), off, dtype=torch.float64).scatter_(1, target[:, None], on)

    weight = torch.as_tensor(labels.weight, dtype=torch.float64).reshape(-1, 1)
    return weight * one_hot(labels.first) + (1 - weight) * one_hot(labels.second)


@pytest.mark.parametrize("weight", [1.0, 0.7, 0.0, [1.0, 0.9, 0.5, 0.2, 0.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_value_and_gradient_equal_those_of_the_soft_target(weight: float | list[float], smoothing: float) -> None:
    """Whether the batch shares a weight or each picture has its own."""
    torch.manual_seed(0)
    logits = torch.randn(6, 10, requires_grad=True)
    labels = Labels(
        torch.randint(10, (6,)), torch.randint(10, (6,)), torch.tensor(weight) if isinstance(weight, list) else weight
    )
    loss = CrossEntropyConfig(label_smoothing=smoothing).build()(logits, labels)
    (gradient,) = torch.autograd.grad(loss, logits)

    exact = logits.detach().double().requires_grad_()
    expected = -(soft_target(labels, 10, smoothing) * exact.log_softmax(1)).sum(1).mean()
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [1.0, torch.tensor([0.25])])
def test_half_precision_logits_are_summed_in_float32(weight: float | torch.Tensor) -> None:
    labels = Labels(torch.tensor([1]), torch.tensor([1]), weight)
    logits = torch.randn(1, 1000).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss = CrossEntropyConfig().build()(logits, labels)
    assert torch.equal(loss, CrossEntropyConfig().build()(logits.float(), labels))
    assert loss.dtype == torch.float32


def test_smoothing_of_one_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"loss\.label_smoothing"):
        CrossEntropyConfig(label_smoothing=1.0)
