"""A run's `metrics.csv` as numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float64

from fat_train.metric.record import COLUMNS, is_epoch_row, read_rows
from fat_train.types import MissingPathError, UserError

METRICS_FILE = "metrics.csv"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class Metrics:
    """Rows of a run in the order in which they were written; NaN stands where a cell is blank."""

    run_dir: Path
    columns: dict[str, Float64[np.ndarray, " rows"]]
    """One array for each name of `fat_train.metric.record.COLUMNS`."""
    is_epoch: Bool[np.ndarray, " rows"]
    """Whether the row stands for a whole epoch, or else for the updates since the row before."""

    def epochs(self, column: str) -> Float64[np.ndarray, " epochs"]:
        """A column at the ends of the epochs."""
        return self.columns[column][self.is_epoch]

    def between(self, column: str) -> Float64[np.ndarray, " steps"]:
        """A column at the rows between."""
        return self.columns[column][~self.is_epoch]

    @property
    def steps_per_epoch(self) -> float | None:
        """Updates of one epoch; None before the first has ended."""
        if not self.is_epoch.any():
            return None
        return float(self.epochs("step")[0] / (self.epochs("epoch")[0] + 1))


def read_metrics(run_dir: Path, key: str = "run") -> Metrics:
    """Read the `metrics.csv` of a run.

    Args:
        run_dir: the run's folder.
        key: the setting that led here, for the message.

    Raises:
        MissingPathError: the folder, or the file in it, is not there.
        UserError: the run has not written a row yet.
    """
    if not run_dir.is_dir():
        raise MissingPathError(f"{key}={run_dir} must be the folder of a run (runs/<name>); there is no such folder")
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise MissingPathError(f"{key}={run_dir} must be the folder of a run (runs/<name>); it holds no {METRICS_FILE}")
    rows = read_rows(path)
    if not rows:
        raise UserError(
            f"{key}={run_dir} must be a run that has trained for a while; its {METRICS_FILE} has no row yet"
        )
    columns = {name: np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS}
    return Metrics(run_dir, columns, np.array([is_epoch_row(row) for row in rows]))
