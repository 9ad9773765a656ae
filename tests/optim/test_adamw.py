"""Matrices and kernels decay; biases and norms do not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fat_train.optim.adamw import AdamWConfig, clip_gradient, leave_out_where, left_out
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


def stepped(bad: float | None, gradient: float = 1.0, max_norm: float = 5.0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small model after three updates, and a fourth of which `bad` was said."""
    torch.manual_seed(0)
    model = nn.Linear(30, 10)
    optimizer = AdamWConfig(base_lr=0.1).build(model, lr=0.1)
    for factor in (3.0, 2.0, 1.0, gradient):
        optimizer.zero_grad()
        (factor * model(torch.randn(8, 30)).square().sum()).backward()
        if factor is gradient and bad is not None:
            leave_out_where(optimizer, torch.tensor(bad))
        if factor is not gradient or bad is not None:
            clip_gradient(optimizer, max_norm)
            optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [*(p.detach() for p in model.parameters()), *moments]


def test_a_step_that_is_left_out_changes_neither_weights_nor_moments_nor_the_count_of_steps() -> None:
    nothing = float("nan")
    assert all(map(torch.equal, state_of(*stepped(1.0, nothing)), state_of(*stepped(None, nothing))))
    assert not all(map(torch.equal, state_of(*stepped(0.0, 0.5)), state_of(*stepped(None, 0.5))))


def test_a_first_step_that_is_left_out_counts_for_nothing() -> None:
    model = nn.Linear(2, 1)
    optimizer = AdamWConfig().build(model, lr=0.1)
    assert left_out(optimizer) is None
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(1, 2)).sum().backward()
    leave_out_where(optimizer, torch.tensor(1.0))
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert {float(value.abs().max()) for state in optimizer.state.values() for value in state.values()} == {0.0}
    leave_out_where(optimizer, torch.tensor(0.0))
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 1e6])
def test_clipping_is_torchs_own_to_the_bit(max_norm: float) -> None:
    models = [nn.Sequential(nn.Linear(30, 20), nn.LayerNorm(20), nn.Linear(20, 10)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(8, 30)
    for model in models:
        model(images).square().sum().backward()
    optimizers = [AdamWConfig().build(model, lr=0.1) for model in models]
    norms = clip_gradient(optimizers[0], max_norm)
    whole = nn.utils.clip_grad_norm_([p for group in optimizers[1].param_groups for p in group["params"]], max_norm)
    assert torch.equal(torch.linalg.vector_norm(norms), whole)
    ours, theirs = ([p.grad for p in model.parameters()] for model in models)
    assert all(map(torch.equal, ours, theirs))


def test_a_gradient_that_is_not_finite_is_not_spread_by_clipping() -> None:
    """What is finite in it still tells where the fault is."""
    model = nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    model.bias.grad = torch.tensor([3.0, 4.0])
    norms = clip_gradient(AdamWConfig().build(model, lr=0.1), 1.0)
    assert model.bias.grad.tolist() == [3.0, 4.0]
    assert sorted(norms.tolist(), key=str) == [5.0, pytest.approx(float("nan"), nan_ok=True)]
