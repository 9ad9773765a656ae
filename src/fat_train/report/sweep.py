"""A sweep's runs beside each other, from what each wrote while it trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from fat_train.report.manifest import Cell
from fat_train.report.metrics import Metrics, read_metrics
from fat_train.report.table import NOTHING, markdown, read_config
from fat_train.types import UserError

FINISHED, UNFINISHED, NOT_STARTED = "finished", "unfinished", "not started"
SERIES = ("val/top1", "val/top1_ema")


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


def cell_table(results: Sequence[Result], states: dict[str, str]) -> str:
    """A row a cell: name, state (its own, or what `states` says by its name), best top-1, epochs."""
    rows = [
        (
            result.cell.name,
            states.get(result.cell.name, result.state),
            *(percent(result.best[name]) for name in shown(results)),
            result.progress,
        )
        for result in results
    ]
    return markdown(("run", "state", *(f"best {name}" for name in shown(results)), "epochs"), rows)


def shown(results: Sequence[Result]) -> list[str]:
    """Those of `SERIES` that some run has; top-1 of the trained weights always."""
    return [name for name in SERIES if name == SERIES[0] or any(np.isfinite(one.best[name]) for one in results)]


def percent(value: float) -> str:
    """Two decimals, or a dash for NaN."""
    return f"{value:.2f}" if np.isfinite(value) else NOTHING


def _known(metrics: Metrics | None, name: str) -> list[float]:
    return [] if metrics is None else [float(value) for value in metrics.epochs(name) if np.isfinite(value)]
