"""Which way an operation is computed: by its plain definition in torch, or by a kernel that computes the same.

The choice is the process's, as torch's own back-end settings are: a model is built once and runs wherever it is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fat_train.types import UserError, one_of

AUTO = "auto"
WAYS = {
    "depthwise": ("torch", "native", "triton"),
    "pointwise": ("torch", "gemm", "onednn"),
    "norm": ("torch", "triton"),
    "interaction": ("torch", "native", "triton"),
    "attention": ("torch", "sdpa", "native"),
}
"""Operation -> the ways there are; `torch` is the definition everywhere."""
DEVICE_OF = {"native": "cpu", "onednn": "cpu", "triton": "cuda"}
"""Ways that one kind of device alone has."""
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What our CUDA kernels read and write."""
Key = tuple[str, ...]
"""Of a table's row: operation, type, then its sizes, as text."""


@dataclass(frozen=True, kw_only=True)
class OpConfig:
    """How each operation is computed; `auto` takes what is fastest on the device at hand."""

    depthwise: str = AUTO
    """Depth-wise convolution: torch, native (CPU, our C++), triton (CUDA)."""
    pointwise: str = AUTO
    """1×1 convolution: torch (a convolution), gemm (a matrix product), onednn (CPU: with its activation)."""
    norm: str = AUTO
    """GroupNorm over the whole map: torch or triton (CUDA)."""
    interaction: str = AUTO
    """FASA's gates and their product: torch, native (CPU, our C++) or triton (CUDA)."""
    attention: str = AUTO
    """torch (scores, softmax and mean one after another), sdpa (torch's fused one), native (CPU, our C++)."""

    def __post_init__(self) -> None:
        for name, ways in WAYS.items():
            one_of(f"op.{name}", getattr(self, name), (AUTO, *ways))

    def refuse_impossible(self, device: str) -> None:
        """Check the request against the kind of device that the run takes ("cpu", "cuda", "mps").

        Raises:
            UserError: a way that only another kind of device has.
        """
        for field in fields(self):
            way = getattr(self, field.name)
            if DEVICE_OF.get(way, device) != device:
                raise UserError(f"op.{field.name}={way} runs on {DEVICE_OF[way]} devices, and this run is on {device}")


REFERENCE = OpConfig(**dict.fromkeys(WAYS, "torch"))
"""Every operation by its definition."""


class Seen(NamedTuple):
    """An operation that was computed."""

    operation: str
    sizes: tuple[Any, ...]
    way: str
    """How."""


_config = OpConfig()
_fastest: dict[tuple[Any, ...], str] = {}  # by operation, type and sizes as they are: Dynamo reads no text of them
_seen: list[Seen] | None = None


def use(config: OpConfig) -> None:
    """Compute so from now on, in this process."""
    global _config  # noqa: PLW0603
    _config = config


@contextmanager
def using(config: OpConfig) -> Iterator[None]:
    """Compute so for a while."""
    before = _config
    use(config)
    try:
        yield
    finally:
        use(before)


def prefer(fastest: Mapping[Key, str]) -> None:
    """Let `auto` take what was measured to be the fastest, by operation and sizes (`tune`)."""
    _fastest.clear()
    _fastest.update({_parsed(key): way for key, way in fastest.items()})


@contextmanager
def recording() -> Iterator[list[Seen]]:
    """Note for a while what is computed, and how."""
    global _seen  # noqa: PLW0603
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before


def way_of(
    operation: str,
    x: Tensor,
    sizes: tuple[Any, ...],
    can: Callable[[str], bool],
    unmeasured: str,
    otherwise: str = "torch",
) -> str:
    """How to compute `operation` on `x` now.

    Args:
        operation: a key of `WAYS`.
        x: its main input; on a meta device nothing is computed, and `torch` knows the shapes.
        sizes: what, beside dtype, tells its cases apart in a table of measurements.
        can: whether a way handles this case (dtype, layout, size) at all.
        unmeasured: what `auto` takes where nothing was measured, on the devices that have it.
        otherwise: what takes the place of a way that cannot.
    """
    way: str = getattr(_config, operation)
    if way == AUTO:
        way = _fastest.get((operation, compute_dtype(x), *sizes), unmeasured) if _fastest else unmeasured
    device = x.device.type
    if device == "meta":
        way = "torch"
    elif way != "torch" and not (DEVICE_OF.get(way, device) == device and can(way)):
        way = otherwise
    if _seen is not None:
        _seen.append(Seen(operation, sizes, way))
    return way


def key_of(operation: str, dtype: torch.dtype, sizes: tuple[Any, ...]) -> Key:
    """The row of a table of measurements."""
    return (operation, str(dtype), *map(str, sizes))


def _parsed(key: Key) -> tuple[Any, ...]:
    operation, dtype, *sizes = key
    flags = {"True": True, "False": False}
    return (
        operation,
        getattr(torch, dtype.removeprefix("torch.")),
        *(flags[size] if size in flags else int(size) for size in sizes),
    )


def kernels_of(x: Tensor, operation: str) -> ModuleType:
    """The module with our kernels of an operation, for the device of `x`."""
    return import_module(f"fat_train.op.{'native' if x.device.type == 'cpu' else 'triton'}.{operation}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a convolution would compute in here: autocast's type inside autocast, else the tensor's own."""
    device = x.device.type
    if device != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
