"""Which way of computing each operation is the fastest here: every way is timed at the sizes that a model has, beside
its definition, and one that computes something else is refused."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fat_train.op.attention import attention
from fat_train.op.choice import DEVICE_OF, REFERENCE, WAYS, Key, OpConfig, key_of, recording, using
from fat_train.op.depthwise import depthwise_conv
from fat_train.op.group_norm import whole_map_norm
from fat_train.op.interaction import interaction
from fat_train.op.pointwise import pointwise_conv
from fat_train.op.table import Milliseconds, Row, Table, empty
from fat_train.op.triton import depthwise_tile

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest error of a value or gradient relative to the largest right one; that of float32 leaves room for TF32."""
SMALLEST_SCALE = 0.1
"""What an error is held against where the right numbers all but vanish: inputs and gradients are about 1."""
CLEARLY = 0.97
"""A kernel of ours takes the definition's place where it needs at most this share of its time."""
NO_CASE = "cannot compute this case"
FLUSH_BYTES = 2**28
"""Written between two measurements on a GPU: more than any second-level cache holds."""
AHEAD_CYCLES = 2_000_000
"""The GPU sleeps for about a millisecond, in which the host queues all of a measurement."""


class Case(NamedTuple):
    """An operation at one size; `sizes` are what its file tells `choice.way_of`."""

    operation: str
    dtype: torch.dtype
    sizes: tuple[Any, ...]

    @property
    def key(self) -> Key:
        """Its row in a table."""
        return key_of(self.operation, self.dtype, self.sizes)


@dataclass(frozen=True)
class _Example:
    """A case with numbers: `compute(*maps, *parameters)`. All maps begin with the axis of the images."""

    compute: Callable[..., Tensor]
    maps: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...]
    dtype: torch.dtype

    def run(self, way: OpConfig) -> Tensor:
        """As the model would compute it: half precision is autocast's, and what reads the result wants its type."""
        device = self.maps[0].device.type
        with using(way), torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
            return self.compute(*self.maps, *self.parameters).to(self.dtype)


def cases_of(
    model: nn.Module, *, batch_size: int, image_px: int, dtype: torch.dtype, in_chans: int = 3
) -> Counter[Case]:
    """Every case that a forward pass of the model has, and how often: a copy runs without numbers (meta device).

    Args:
        model: wherever it is; it is not touched.
        batch_size, image_px, in_chans: of its input.
        dtype: that its convolutions compute in.
    """
    copy = deepcopy(model).to("meta").eval()  # sizes are the same, and BatchNorm then takes a single image too
    with torch.no_grad(), recording() as seen:
        copy.forward(torch.empty(batch_size, in_chans, image_px, image_px, device="meta"))
    return Counter(Case(one.operation, dtype, tuple(one.sizes)) for one in seen)


def tune(
    cases: Iterable[Case],
    device: torch.device,
    *,
    rounds: int,
    on_case: Callable[[Case], None] = lambda _: None,
    training: bool = True,
) -> Table:
    """Measure.

    Args:
        cases: what.
        device: where.
        rounds: turns of each way that count, one more comes before them.
        on_case: told before each.
        training: choose by forward and backward together, or by forward alone.
    """
    rows = {}
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    for case in cases:
        on_case(case)
        rows[case.key] = _measure(case, device, rounds, clock, training)
    return empty(device).with_rows(rows)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a plain copy reads and writes together: what no pass over memory surpasses by much."""
    source = torch.zeros(FLUSH_BYTES // (1 if device.type == "cuda" else 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    return 2e3 * source.numel() / _best(_race({"copy": lambda: target.copy_(source)}, clock, 5)["copy"], device)


def _measure(case: Case, device: torch.device, rounds: int, clock: _Clock, training: bool) -> Row:
    example = _example(case, device)
    ways, refused = {}, {}
    for name in WAYS[case.operation]:
        if DEVICE_OF.get(name, device.type) != device.type:
            continue
        way = OpConfig(**{**_TORCH, case.operation: name})
        trouble = _trouble(example, way, name)
        if not trouble:
            ways[name] = way
        elif trouble != NO_CASE:
            refused[name] = trouble
    tiles = _tiles(case, example) if case.operation == "depthwise" and "triton" in ways else {}
    forward = _race({name: partial(_forward, example, way) for name, way in ways.items()}, clock, rounds)
    step = _race({name: partial(_step, example, way) for name, way in ways.items()}, clock, rounds)
    times = {name: Milliseconds(_best(forward[name], device), _best(step[name], device)) for name in ways}
    read = sum(one.numel() for one in example.maps) * case.dtype.itemsize
    written = _output_numel(example) * case.dtype.itemsize
    return Row(
        key=case.key,
        way=_fastest({name: ms.step if training else ms.forward for name, ms in times.items()}),
        times=times,
        refused=refused,
        forward_bytes=read + written,
        step_bytes=2 * (read + written) + read,
        tiles=tuple((key, tuple(tile)) for key, tile in tiles.items()),
    )


_TORCH = dict.fromkeys(WAYS, "torch")


def _tiles(case: Case, example: _Example) -> dict[depthwise_tile.Key, depthwise_tile.Tile | depthwise_tile.Strip]:
    """The best division of the map for our CUDA kernels, which from now on take it."""
    kernels = import_module("fat_train.op.triton.depthwise")  # Triton is not on every system
    *_, stride, residual = case.sizes
    best = kernels.tune(example.maps[0].detach(), example.parameters[0].detach(), stride, residual)
    depthwise_tile.prefer({**depthwise_tile.measured(), **best})
    tiles: dict[depthwise_tile.Key, depthwise_tile.Tile | depthwise_tile.Strip] = best
    return tiles


def _fastest(times: dict[str, float]) -> str:
    """The definition unless another is clearly faster, so that noise does not decide."""
    best = min(times, key=lambda name: times[name], default="torch")
    return best if "torch" not in times or times[best] < CLEARLY * times["torch"] else "torch"


def _trouble(example: _Example, way: OpConfig, name: str) -> str:
    """Why a way may not be taken; empty where its values and gradients are those of the definition in float64.

    All images are computed, the first and the last are compared: the others' part of the gradient is 0.
    """
    with recording() as seen:
        try:
            y = example.run(way)
            errors = _errors(example, y)
        except torch.AcceleratorError:
            raise  # the device itself is in a state that no other way would survive
        except Exception as error:
            errors, trouble = [], f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    if seen and seen[0].way != name:
        return NO_CASE
    if not errors:
        return trouble
    worst = max(errors, key=lambda error: float("inf") if np.isnan(error) else error)
    return "" if worst <= TOLERANCE[example.dtype] else f"its error is {worst:.1e} of the largest number"


def _errors(example: _Example, y: Tensor) -> list[float]:
    """Of the values and of each gradient."""
    some = sorted({0, len(y) - 1})
    grad = torch.zeros_like(y)
    grad[some] = _randn(y[some].shape, y.device).to(y.dtype)
    gradients = torch.autograd.grad(y, (*example.maps, *example.parameters), grad)
    count = len(example.maps)
    got = [y[some], *(one[some] for one in gradients[:count]), *gradients[count:]]
    inputs = [one.detach()[some] for one in example.maps] + [one.detach() for one in example.parameters]
    wide = [one.double().requires_grad_() for one in inputs]
    with using(REFERENCE):
        right = example.compute(*wide)
    wanted = [right, *torch.autograd.grad(right, wide, grad[some].double())]
    return [_error(one.detach(), other.detach()) for one, other in zip(got, wanted, strict=True)]


def _error(got: Tensor, right: Tensor) -> float:
    return float((got.double() - right).abs().max() / right.abs().max().clamp(min=SMALLEST_SCALE))


def _forward(example: _Example, way: OpConfig) -> None:
    with torch.no_grad():
        example.run(way)


def _step(example: _Example, way: OpConfig) -> None:
    y = example.run(way)
    torch.autograd.grad(y, (*example.maps, *example.parameters), y.detach())


def _output_numel(example: _Example) -> int:
    with torch.no_grad():
        return example.run(REFERENCE).numel()


_Clock = Callable[[Callable[[], Any]], Callable[[], float]]
"""Runs an action; what it returns gives the milliseconds, later: a GPU need not be waited for in between."""


def _race(actions: dict[str, Callable[[], Any]], clock: _Clock, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turns, so that whatever else the machine does hurts all of them alike."""
    turns = [{name: clock(action) for name, action in actions.items()} for _ in range(rounds + 1)]
    return {name: [turn[name]() for turn in turns[1:]] for name in actions}


def _best(times: Sequence[float], device: torch.device) -> float:
    """A GPU's times scatter both ways; others' work only ever adds to those of a CPU."""
    return float(np.median(times) if device.type == "cuda" else np.min(times))


def _cpu_clock(action: Callable[[], Any]) -> Callable[[], float]:
    started = time.perf_counter()
    action()
    elapsed = 1000 * (time.perf_counter() - started)
    return lambda: elapsed


def _cuda_clock(device: torch.device) -> _Clock:
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def clock(action: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        flushed.zero_()
        start.record()
        action()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return float(start.elapsed_time(end))

        return milliseconds

    return clock


def _randn(shape: Sequence[int], device: torch.device) -> Tensor:
    """The same numbers at every call, and none taken from the process's own generators."""
    return torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(0))


def _example(case: Case, device: torch.device) -> _Example:
    """Channels-last maps in the case's type, parameters in float32, as a training holds them."""
    maps, parameters, compute = _MAKERS[case.operation](case.sizes, partial(_randn, device=device))
    typed = [one.to(case.dtype) for one in maps]
    if case.operation != "attention":
        typed = [one.contiguous(memory_format=torch.channels_last) for one in typed]
    return _Example(
        compute,
        tuple(one.detach().requires_grad_() for one in typed),
        tuple(one.detach().requires_grad_() for one in parameters),
        case.dtype,
    )


_Made = tuple[list[Tensor], list[Tensor], Callable[..., Tensor]]


def _depthwise(sizes: tuple[Any, ...], randn: Callable[..., Tensor]) -> _Made:
    *shape, kernel_size, stride, residual = sizes
    weight = randn((shape[1], 1, kernel_size, kernel_size)) / kernel_size
    compute = partial(depthwise_conv, stride=stride, residual=residual)
    return [randn(shape)], [weight, randn(shape[1:2])], compute


def _pointwise(sizes: tuple[Any, ...], randn: Callable[..., Tensor]) -> _Made:
    *shape, out = sizes
    return [randn(shape)], [randn((out, shape[1], 1, 1)) * shape[1] ** -0.5, randn((out,))], pointwise_conv


def _norm(sizes: tuple[Any, ...], randn: Callable[..., Tensor]) -> _Made:
    return [randn(sizes)], [1 + randn(sizes[1:2]), randn(sizes[1:2])], partial(whole_map_norm, eps=1e-5)


def _interaction(sizes: tuple[Any, ...], randn: Callable[..., Tensor]) -> _Made:
    *shape, both_ways = sizes
    return [randn(shape), randn(shape).flip(0, 1)], [], partial(interaction, both_ways=both_ways)


def _attention(sizes: tuple[Any, ...], randn: Callable[..., Tensor]) -> _Made:
    """Queries and keys with values lie as FAT's 1×1 convs give them: a token's heads side by side, its key and value
    too."""
    images, heads, queries, width, tokens = sizes

    def compute(q: Tensor, kv: Tensor) -> Tensor:
        k, v = kv.unbind(2)
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    return [randn((images, queries, heads, width)), randn((images, tokens, 2, heads, width))], [], compute


_MAKERS: dict[str, Callable[[tuple[Any, ...], Callable[..., Tensor]], _Made]] = {
    "depthwise": _depthwise,
    "pointwise": _pointwise,
    "norm": _norm,
    "interaction": _interaction,
    "attention": _attention,
}
assert _MAKERS.keys() == WAYS.keys()
