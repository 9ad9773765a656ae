"""The kernels of the norm and of the interaction in Triton's interpreter, on the CPU, against float64: a program of its
own, as the interpreter has to be chosen before a kernel is defined. Prints errors as JSON, each relative to the largest
number of the right answer."""

from __future__ import annotations

import json
import os
from importlib import import_module

os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from fat_train.model.fat import FATConfig, InteractionConfig
from fat_train.op import choice
from fat_train.op import group_norm as ops_norm
from fat_train.op import interaction as ops_interaction
from fat_train.op.choice import OpConfig
from fat_train.op.triton import group_norm, interaction

SHAPES = [(3, 7, 5, 9), (2, 80, 7, 9), (1, 33, 31, 17), (5, 64, 1, 1), (2, 1, 3, 3), (1, 2500, 2, 1)]
LARGE = (2, 32, 48, 33)
"""Several tiles a program, several programs an image."""


def worst(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> list[float]:
    return [
        float((one.double() - other.detach()).abs().max() / other.abs().max())
        for one, other in zip(got, right, strict=True)
    ]


def random_map(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    return (mean + torch.randn(shape)).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_errors(x: Tensor, grad: Tensor, wide: torch.dtype) -> list[float]:
    weight, bias = torch.randn(2, x.shape[1]).to(wide)
    y, mean, rstd = group_norm.forward(x, weight, bias, 1e-5)
    assert y.stride() == x.stride()
    assert y.dtype == x.dtype
    inputs = [given.double().requires_grad_() for given in (x, weight, bias)]
    right = F.group_norm(inputs[0], 1, *inputs[1:], 1e-5)
    gradients = torch.autograd.grad(right, inputs, grad.double())
    moments = (inputs[0].flatten(1).mean(1), (inputs[0].flatten(1).var(1, correction=0) + 1e-5).rsqrt())
    got = (y, mean, rstd, *group_norm.grad(grad, x, weight, mean, rstd))
    assert [one.dtype for one in got[1:]] == [torch.float32, torch.float32, x.dtype, torch.float32, torch.float32]
    return worst(got, (right, *moments, *gradients))


def interaction_errors(q: Tensor, g: Tensor, grad: Tensor, both_ways: bool) -> list[float]:
    inputs = [given.double().requires_grad_() for given in (q, g)]
    right = interaction_definition(*inputs, both_ways)
    gradients = torch.autograd.grad(right, inputs, grad.double())
    got = (interaction.forward(q, g, both_ways), *interaction.grad(grad, q, g, both_ways))
    assert all(one.is_contiguous(memory_format=torch.channels_last) and one.dtype == q.dtype for one in got)
    return worst(got, (right, *gradients))


def interaction_definition(q: Tensor, g: Tensor, both_ways: bool) -> Tensor:
    local = q / (1 + torch.exp(-q))
    y = local * g / (1 + torch.exp(-g))
    return y / (1 + torch.exp(-local)) if both_ways else y


def network_errors(gate: str) -> list[float]:
    """Of a whole network's logits and gradients against its definitions, both in float32."""
    settings = InteractionConfig(gate=gate)
    config = FATConfig(
        name="tiny", widths=[8, 24, 16, 16], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], interaction=settings
    )
    model = config.build(num_classes=3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 48)
    results = []
    for ways in (OpConfig(norm="triton", interaction="triton"), choice.REFERENCE):
        with choice.using(ways), choice.recording() as seen:
            logits = model(x)
        taken = {one.way for one in seen if one.operation in ("norm", "interaction")}
        assert taken == {ways.norm}
        gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits.detach(), *gradients))
    pairs = [(ours, right) for ours, right in zip(*results, strict=True) if right.abs().max() > 1e-2]
    assert len(pairs) > 50, "the others are biases before a norm, whose gradients are nothing but rounding"
    return [float((ours - right).abs().max() / right.abs().max()) for ours, right in pairs]


def let_a_cpu_run_the_kernels() -> None:
    choice.DEVICE_OF.pop("triton")
    for operation in (ops_norm, ops_interaction):
        operation.kernels_of = lambda _, name: import_module(f"fat_train.op.triton.{name}")


def check_registration() -> None:
    """torch's own rules for operations: fakes, gradients, results that share no memory."""
    x = random_map((2, 8, 6, 5), torch.float32).requires_grad_()
    weight, bias = (torch.randn(8).requires_grad_() for _ in range(2))
    torch.library.opcheck(torch.ops.fat_train.whole_map_norm.default, (x, weight, bias, 1e-5))
    torch.library.opcheck(torch.ops.fat_train.interaction.default, (x, x.detach().clone().requires_grad_(), True))


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, list[float]] = {}
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        for shape in SHAPES if dtype == torch.float32 else SHAPES[1:2]:
            x, grad = random_map(shape, dtype), torch.randn(shape).to(dtype)  # a gradient may come in any layout
            errors[f"norm {name} {shape}"] = norm_errors(x, grad, torch.float32)
        for both_ways in (False, True):
            q, g, grad = (3 * random_map(SHAPES[1], dtype) for _ in range(3))
            errors[f"interaction {name} {both_ways}"] = interaction_errors(q, g, grad, both_ways)
    x = random_map(LARGE, torch.float32)
    errors[f"norm float32 {LARGE}"] = norm_errors(x, torch.randn_like(x), torch.float32)
    errors["norm float32 mean 100"] = norm_errors(random_map(LARGE, torch.float32, mean=100), x, torch.float32)
    errors["norm bfloat16 with weights of its own type"] = norm_errors(x.bfloat16(), x.bfloat16(), torch.bfloat16)
    jump = x.clone()
    jump[:, :, 24:] += 1000
    errors["norm float32 one half far from the other"] = norm_errors(jump, x, torch.float32)
    q, g, grad = (random_map(SHAPES[1], torch.float32) for _ in range(3))
    errors["interaction float32 layouts"] = interaction_errors(
        q.contiguous(), g, grad.transpose(2, 3).contiguous().transpose(2, 3), True
    )
    extreme = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0, 1.0]).reshape(1, 6, 1, 1)
    errors["interaction float32 extreme"] = interaction_errors(extreme, extreme, torch.ones_like(extreme), True)
    again = [group_norm.grad(x, x, torch.ones(32), *torch.ones(2, 2)) for _ in range(2)]
    errors["norm float32 twice"] = worst(again[1], tuple(one.double() for one in again[0]))
    let_a_cpu_run_the_kernels()
    check_registration()
    for gate in ("released", "paper"):
        errors[f"network {gate}"] = network_errors(gate)
    empty = torch.empty(0, 4, 3, 3)
    group_norm.forward(empty, torch.ones(4), torch.ones(4), 1e-5)
    assert not group_norm.grad(empty, empty, torch.ones(4), torch.empty(0), torch.empty(0))[1].any()
    assert interaction.forward(empty, empty, True).shape == empty.shape
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
