"""Matrices and kernels decay; biases and norms do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fat_train.optim.adamw import AdamWConfig
from fat_train.types import UserError


def test_only_parameters_of_two_dimensions_or_more_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = AdamWConfig().build(model, lr=1e-3)
    decaying = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decaying == {id(model[0].weight), id(model[3].weight)}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_names_that_a_model_exempts_do_not_decay() -> None:
    class Exempting(nn.Linear):
        def no_weight_decay(self) -> set[str]:
            return {"weight"}

    optimizer = AdamWConfig().build(Exempting(2, 2), lr=1e-3)
    assert all(group["weight_decay"] == 0 for group in optimizer.param_groups if group["params"])


def test_an_update_is_that_of_the_formula() -> None:
    """One update from zero moments: w − lr·wd·w − lr·g / (|g| + eps), with decay for the matrix alone."""
    model = nn.Linear(3, 3).double()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = AdamWConfig(weight_decay=0.5).build(model, lr=0.01)
    model(torch.ones(2, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient, decay = parameter.grad, 0.5 if name == "weight" else 0.0
        expected = before[name] - 0.01 * decay * before[name] - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"base_lr": 0.0}, "optim.base_lr"),
        ({"betas": [0.9]}, "optim.betas"),
        ({"betas": [0.9, 1.0]}, "optim.betas"),
        ({"weight_decay": -0.1}, "optim.weight_decay"),
        ({"lr_per_images": 0}, "optim.lr_per_images"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        AdamWConfig(**settings)
