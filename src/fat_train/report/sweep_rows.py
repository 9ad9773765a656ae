"""A sweep's runs as numbers: how far each has come, how well it does, and which differ in their seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from omegaconf import OmegaConf

from fat_train.report.manifest import Cell, Manifest, as_number
from fat_train.report.metrics import Metrics, read_metrics
from fat_train.report.table import NOTHING, read_config
from fat_train.types import UserError

FINISHED, UNFINISHED, NOT_STARTED = "finished", "unfinished", "not started"
SERIES = ("val/top1", "val/top1_ema")
SEED = "seed"
When = Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one cell's folder says."""

    cell: Cell
    epochs: int
    """Finished ones."""
    asked: int | None
    """`schedule.epochs` of its newest start; None before the first."""
    best: dict[str, float]
    """Highest of each of `SERIES`, in percent; NaN where there is none."""
    last: dict[str, float]
    """Newest of each of `SERIES`, in percent; NaN where there is none."""

    @property
    def state(self) -> str:
        """finished, unfinished or not started."""
        if self.asked is None:
            return NOT_STARTED
        return FINISHED if self.epochs >= self.asked else UNFINISHED

    @property
    def progress(self) -> str:
        """Epochs behind it, of those asked for."""
        return NOTHING if self.asked is None else f"{self.epochs}/{self.asked}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """Runs that differ in their seed alone."""

    values: dict[str, str]
    """Key -> value of what is swept but for the seed."""
    results: list[Result]
    """A run each."""

    @property
    def counted(self) -> list[Result]:
        """The runs that its numbers are of: the finished ones, or all while there are none."""
        return [one for one in self.results if one.state == FINISHED] or self.results

    def seen(self, when: When, name: str) -> list[float]:
        """The accuracies that its numbers are of, in percent."""
        return [value for one in self.counted if np.isfinite(value := getattr(one, when)[name])]

    def mean(self, when: When, name: str) -> float:
        """Over seeds; NaN where no run has been validated."""
        return float(np.mean(seen)) if (seen := self.seen(when, name)) else np.nan

    def spread(self, when: When, name: str) -> float:
        """Standard deviation over seeds; NaN for a single one."""
        return float(np.std(seen, ddof=1)) if len(seen := self.seen(when, name)) > 1 else np.nan

    @property
    def progress(self) -> str:
        """Epochs that its runs have behind them, of those asked for."""
        done = sorted({one.epochs for one in self.results})
        asked = sorted({one.asked for one in self.results if one.asked is not None})
        if not asked:
            return NOTHING
        return "/".join("–".join(str(one) for one in sorted({ends[0], ends[-1]})) for ends in (done, asked))

    @property
    def state(self) -> str:
        """finished, unfinished, not started, or how many are finished."""
        states = [one.state for one in self.results]
        if len(set(states)) == 1:
            return states[0]
        return f"{states.count(FINISHED)} of {len(states)} finished"


def read_result(sweep: Path, cell: Cell) -> Result:
    """How far a cell of the sweep in a folder has come, and how well it does."""
    run_dir = sweep / cell.name
    try:
        metrics = read_metrics(run_dir)
    except UserError:  # it has not trained yet
        metrics = None
    seen = {name: _known(metrics, name) for name in SERIES}
    ended = metrics is not None and metrics.is_epoch.any()
    return Result(
        cell=cell,
        epochs=int(metrics.epochs("epoch").max()) + 1 if metrics is not None and ended else 0,
        asked=OmegaConf.select(read_config(run_dir), "schedule.epochs"),
        best={name: max(values, default=np.nan) for name, values in seen.items()},
        last={name: values[-1] if values else np.nan for name, values in seen.items()},
    )


def group(manifest: Manifest, results: Sequence[Result]) -> list[Row]:
    """A row for each combination of values without the seed, numbers in their order and before words."""
    keys = [key for key in manifest.keys if key != SEED]
    rows: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        rows.setdefault(tuple(result.cell.values[key] for key in keys), []).append(result)
    ordered = sorted(rows, key=lambda values: [in_order(value) for value in values])
    return [Row(values=dict(zip(keys, values, strict=True)), results=rows[values]) for values in ordered]


def in_order(value: str) -> tuple[bool, float, str]:
    """Sorts numbers by size, then words."""
    number = as_number(value)
    return (True, 0.0, value) if number is None else (False, number, "")


def best_row(rows: Sequence[Row], name: str) -> Row | None:
    """The row with the highest mean of a series; None where no run has been validated."""
    known = [row for row in rows if np.isfinite(row.mean("best", name))]
    return max(known, key=lambda row: row.mean("best", name), default=None)


def shown(results: Sequence[Result]) -> list[str]:
    """Those of `SERIES` that some run has; top-1 of the trained weights always."""
    return [name for name in SERIES if name == SERIES[0] or any(np.isfinite(one.best[name]) for one in results)]


def _known(metrics: Metrics | None, name: str) -> list[float]:
    return [] if metrics is None else [float(value) for value in metrics.epochs(name) if np.isfinite(value)]
