"""Reading back what loggers have written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from fat_train.logger.background import numbers, points
from fat_train.metric.record import read_rows

BLOCK, HEADER, PREAMBLE = 32 * 1024, 7, 7


class WandbFile(NamedTuple):
    """What an offline run's file says."""

    run_id: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    x_axes: dict[str, str]


def _records(content: bytes) -> Iterator[Record]:
    """A `.wandb` file is a log of LevelDB's kind: chunks that do not cross blocks of 32 KiB, behind a preamble."""
    assert content[:4] == b":W&B"
    at, parts = PREAMBLE, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if kind == 0:
            return
        parts += content[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _read_wandb(file: Path) -> WandbFile:
    run_id, config, history, x_axes, globs = "", {}, [], {}, {}
    for record in _records(file.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run_id = record.run.run_id
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "metric":
            names = x_axes if record.metric.name else globs
            names[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "history":
            history.append(
                {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            )
    return WandbFile(run_id, config, history, globs | x_axes)


@pytest.fixture(scope="session")
def read_wandb() -> Callable[[Path], WandbFile]:
    """The content of a `.wandb` file."""
    return _read_wandb


@pytest.fixture(scope="session")
def points_of() -> Callable[[Path], list[dict[str, float]]]:
    """What a plot has to show of a run: the points of each row of its metrics.csv."""

    def read(run: Path) -> list[dict[str, float]]:
        return [points(numbers(row)) for row in read_rows(run / "metrics.csv")]

    return read
