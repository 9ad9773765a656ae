"""What was measured of the operations on a device, and which way was the fastest: in memory and as a file of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fat_train.op.choice import AUTO, WAYS, Key, prefer
from fat_train.op.triton import depthwise_tile

FOLDER_NAME = "kernels-v1"  # raise the version when the same row would mean something else


class Milliseconds(NamedTuple):
    """Of one way of one case."""

    forward: float
    step: float
    """Forward and backward."""


@dataclass(frozen=True)
class Row:
    """One operation at one size."""

    key: Key
    """Operation, type, sizes."""
    way: str
    """The fastest, which `auto` takes; or "auto" itself: not measured, and not to be."""
    times: Mapping[str, Milliseconds] = field(default_factory=dict)
    """Of each way that can compute it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Ways that failed, or whose result was wrong, with the reason."""
    forward_bytes: int = 0
    """That the definition cannot but move: inputs and output once; parameters not counted."""
    step_bytes: int = 0
    """The same, with those of the backward pass: the output's gradient, the inputs, their gradients."""
    tiles: Sequence[tuple[depthwise_tile.Key, tuple[int, ...]]] = ()
    """How our CUDA kernels of this case divide the map best."""


@dataclass(frozen=True)
class Table:
    """Rows of one device under one release of torch and Triton: elsewhere others may be the fastest."""

    device: str
    torch_release: str
    triton_release: str
    rows: Mapping[Key, Row] = field(default_factory=dict)

    def fastest(self) -> dict[Key, str]:
        """What `choice.prefer` wants."""
        return {key: row.way for key, row in self.rows.items() if row.way != AUTO}

    def take(self) -> None:
        """Let `auto` and our CUDA kernels go by these rows, in this process."""
        prefer(self.fastest())
        tiles = (pair for row in self.rows.values() for pair in row.tiles)
        depthwise_tile.prefer({key: depthwise_tile.tile_of(key, numbers) for key, numbers in tiles})

    def lacks(self, keys: Iterable[Key]) -> list[Key]:
        """Those of `keys` that were not measured."""
        return [key for key in keys if key not in self.rows]

    def only(self, keys: Iterable[Key]) -> Table:
        """The rows of `keys`, as far as there are any."""
        return self.with_rows({key: self.rows[key] for key in keys if key in self.rows})

    def with_rows(self, rows: Mapping[Key, Row]) -> Table:
        """The same device with other rows."""
        return Table(self.device, self.torch_release, self.triton_release, rows)

    def is_of(self, device: torch.device) -> bool:
        """Whether it was measured on such a device, whatever the releases."""
        return self.device == device_name(device)

    def as_json(self) -> str:
        """The file's text."""
        values = asdict(self) | {"rows": [asdict(row) for row in self.rows.values()]}
        return json.dumps(values, indent=1)

    def sentence(self) -> str:
        """How often each way was chosen, operation by operation; "auto" is the fixed choice."""
        parts = []
        for operation in WAYS:
            ways = [row.way for key, row in self.rows.items() if key[0] == operation]
            counts = sorted(((ways.count(way), way) for way in set(ways)), reverse=True)
            if ways:
                chosen = ", ".join(f"{way} in {count}" for count, way in counts)
                parts.append(f"{operation}: {chosen} of {len(ways)} shapes")
        return "; ".join(parts) or "nothing measured"


def empty(device: torch.device) -> Table:
    """A table without rows, of this device and the releases at hand."""
    return Table(device_name(device), torch.__version__, triton_version())


def path_of(folder: Path, device: torch.device) -> Path:
    """Where the table of this device and these releases lies in the cache folder."""
    words = f"{device_name(device)} torch {torch.__version__} triton {triton_version()}"
    return folder / FOLDER_NAME / (re.sub(r"[^A-Za-z0-9.+]+", "-", words).strip("-") + ".json")


def load(file: Path) -> Table | None:
    """The table in a file; None where there is none, or none that can be read."""
    try:
        values = json.loads(file.read_text())
        rows = [_row(row) for row in values.pop("rows")]
        return Table(**values, rows={row.key: row for row in rows})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def device_name(device: torch.device) -> str:
    """The product's name; of a CPU only that it is one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def triton_version() -> str:
    """Its release, or "none" where it is not installed."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def _row(values: dict[str, Any]) -> Row:
    values["key"] = tuple(values["key"])
    values["times"] = {way: Milliseconds(*times) for way, times in values["times"].items()}
    values["tiles"] = tuple((tuple(key), tuple(numbers)) for key, numbers in values.get("tiles", ()))
    row = Row(**values)
    if row.way not in (AUTO, *WAYS[row.key[0]]):
        raise ValueError(f"{row.key[0]} has no way {row.way}")
    return row
