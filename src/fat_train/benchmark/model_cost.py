"""What a step of a network costs on paper: multiply-adds, bytes, and the shortest time that they allow on a device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fat_train.benchmark.race import Stream

BATCHED_PRODUCTS = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
ADAMW_PASSES = 7
"""Times that AdamW passes over memory as large as the parameters: it reads weight, gradient and two moments and writes
the weight and the moments."""
GEMM_SIDE = {"cpu": 1536, "cuda": 8192}
COPIED_BYTES = {"cpu": 2**27, "cuda": 2**31}
"""More than caches hold."""


@dataclass(frozen=True)
class StepCost:
    """Of one step (a batch through the network, and back where it trains)."""

    flops: int
    """Two a multiply-add of convolutions, linear layers and matrix products; all else is left out."""
    elements: int
    """Numbers that these operations read and write if each is one kernel into which everything between them is fused,
    attention's logits included: an operation's operands and result once each, of a batched product the two smaller of
    its three tensors. Nothing that makes a kernel of each of them moves less; a cache may."""
    parameters: int
    """Of the network."""
    trains: bool

    def bytes(self, bytes_per_element: int) -> int:
        """Of all operands and results at the precision of the arithmetic, and what the optimiser passes over."""
        return self.elements * bytes_per_element + (4 * ADAMW_PASSES * self.parameters if self.trains else 0)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in flop_registry:
            if packet == torch.ops.aten.convolution_backward:
                self.flops += _flops_of_gradients(*args)
            else:
                self.flops += flop_registry[packet](*args, **kwargs, out_val=out)
            sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.elements += sum(sorted(sizes)[:2]) if packet in BATCHED_PRODUCTS else sum(sizes)
        return out


def _flops_of_gradients(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> int:
    """Those of a convolution's input and of its weight cost what the convolution did. (torch's own count takes a
    grouped one for a full one here.)"""
    del x
    wanted: list[bool] = rest[-1]
    return 2 * gradient.numel() * weight[0].numel() * sum(wanted[:2])


def count(model: nn.Module, images: tuple[int, ...], trains: bool) -> StepCost:
    """Run a copy of `model` without its numbers, on torch's device "meta".

    Args:
        model: a classifier; it is left as it is.
        images: shape of the batch.
        trains: count the backward pass and the optimiser too.
    """
    shadow = copy.deepcopy(model).to("meta").train(trains)
    with torch.set_grad_enabled(trains), _Counter() as counter:
        logits = shadow(torch.empty(images, device="meta"))
        if trains:
            logits.sum().backward()
    parameters = sum(parameter.numel() for parameter in shadow.parameters())
    return StepCost(counter.flops, counter.elements, parameters, trains)


def open_gemm(device: str, dtype: torch.dtype, repeats: int) -> Stream:
    """A contestant whose rate is floating-point operations per second, of a square product in `dtype`.

    On a GPU float32 may use TF32, which convolutions do by torch's default: the rate is to be one that none exceeds.
    """
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    side = GEMM_SIDE[device]
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Stream(_pieces(lambda: torch.mm(a, b, out=out), 2 * side**3, device, repeats), {})


def open_copy(device: str, repeats: int) -> Stream:
    """A contestant whose rate is bytes per second, read and written ones together, of a copy on the device."""
    source = torch.randn(COPIED_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    return Stream(_pieces(lambda: target.copy_(source), 2 * COPIED_BYTES[device], device, repeats), {})


def _pieces(work: Callable[[], object], amount: int, device: str, repeats: int) -> Iterator[int]:
    while True:
        for _ in range(repeats):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        yield amount * repeats


@dataclass(frozen=True)
class DeviceRates:
    """The best that the device showed in this run; not numbers where it was not asked."""

    flops_per_s: float = math.nan
    bytes_per_s: float = math.nan

    def floor_s(self, flops: float, moved_bytes: float) -> float:
        """Seconds: the longer of computing at the GEMM rate and moving at the copy rate."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)

    def best(self, flops_per_s: float, bytes_per_s: float) -> DeviceRates:
        """With another measurement; what is not a number is passed over."""
        return DeviceRates(_larger(self.flops_per_s, flops_per_s), _larger(self.bytes_per_s, bytes_per_s))


def _larger(one: float, other: float) -> float:
    return max((rate for rate in (one, other) if not math.isnan(rate)), default=math.nan)
