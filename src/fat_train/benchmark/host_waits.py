"""Where the host asks a device for a value, and so waits until the device is through with everything before it."""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = Path(__file__).parents[1]
OUTSIDE = tuple(str(PACKAGE / part) for part in ("benchmark", "command", "__main__.py"))
"""They are on the stack of every step."""
READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")
"""Operators whose answer is a number of the host, or a shape that depends on values."""
TORCH = Path(torch.__file__).parent
BETWEEN = (
    *(str(TORCH / part) for part in ("utils/_python_dispatch.py", "_dynamo", "_compile.py")),
    warnings.__file__,
    __file__,
)
"""What stands between an operator and its observer."""
SYNCHRONIZES = "called a synchronizing CUDA operation"


@dataclass
class Waits:
    """How often, by the place in the source."""

    in_step: Counter[str] = field(default_factory=Counter)
    in_loader: Counter[str] = field(default_factory=Counter)
    """While a batch was asked for; that time is the data's."""

    def lines(self) -> list[str]:
        """`place (n times)`, the most frequent first."""
        return [f"{place}{f' ({count} times)' if count > 1 else ''}" for place, count in self.in_step.most_common()]


class HostReads(TorchDispatchMode):
    """Counts the operators of `READS` while it is entered, by source line.

    It is for the CPU, where nobody waits for them, and sees what the CPU's way through the code asks.
    """

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the operator run; note who asked."""
        del types
        if func._schema.name in READS:
            self._waits.in_step[place_of(sys._getframe(1))] += 1
        return func(*args, **(kwargs or {}))


class SyncWatch:
    """Counts the waits that torch itself warns of, on CUDA, in the thread that enters this.

    Events that the host waits for on purpose are not among them.

    Args:
        waits: where to.
        part: tells which part of the step is at work.
    """

    def __init__(self, waits: Waits, part: Callable[[], str]) -> None:
        self.is_silent = False
        """In updates that write a row of metrics the host may wait."""
        self._waits = waits
        self._part = part
        self._thread = threading.get_ident()
        self._kept = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._kept.__enter__()
        warnings.filterwarnings("always", message=f".*{SYNCHRONIZES}")
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        self._show = warnings.showwarning
        warnings.showwarning = self._note
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._kept.__exit__(None, None, None)

    def _note(self, message: Warning | str, *rest: Any, **more: Any) -> None:
        if SYNCHRONIZES not in str(message):
            self._show(message, *rest, **more)
        elif not self.is_silent and threading.get_ident() == self._thread:
            into = self._waits.in_loader if self._part() == "data" else self._waits.in_step
            into[place_of(sys._getframe(1))] += 1


def place_of(frame: FrameType | None) -> str:
    """`task/classification.py:57`: our line that led there, with another library's where that one asked."""
    frames = [one for one in _outwards(frame) if not one.f_code.co_filename.startswith(BETWEEN)]
    ours = next((one for one in frames if _is_ours(one)), None)
    innermost = frames[0]
    if ours is None:
        return _name(innermost)
    return _name(ours) if ours is innermost else f"{_name(ours)} (in {_name(innermost)})"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return file.startswith(str(PACKAGE)) and not file.startswith(OUTSIDE)


def _name(frame: FrameType) -> str:
    """The file below its package's folder, and the line."""
    file = Path(frame.f_code.co_filename)
    if file.is_relative_to(PACKAGE):
        return f"{file.relative_to(PACKAGE)}:{frame.f_lineno}"
    parts = file.parts
    start = len(parts) - parts[::-1].index("site-packages") if "site-packages" in parts else -1
    return f"{'/'.join(parts[start:])}:{frame.f_lineno}"
