"""report: curves and a table of a run, or of all runs of a sweep, from what they wrote while they trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.report.metrics import read_metrics
from fat_train.report.sweep import write_sweep_report
from fat_train.report.table import epoch_table, write_report
from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """The whole of `conf/report.yaml`."""

    run: str | None = None
    """A run's folder."""
    sweep: str | None = None
    """A sweep's folder, which holds `sweep.yaml`."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.sweep is None):
            got = "neither" if self.run is None else "both"
            raise UserError(f"report wants run=<a run's folder> or sweep=<a sweep's folder>; got {got}")


def run(tree: DictConfig) -> tuple[Path, ...]:
    """Write the report's files into the folder and print the table; returns the files' paths.

    Raises:
        UserError: no such folder, or nothing in it yet.
    """
    settings = resolve(plain(tree), ReportSettings, where="")
    written: dict[str, Path]
    if settings.sweep is not None:
        table, paths = write_sweep_report(Path(settings.sweep).expanduser())
        written = dict(zip(("table", "numbers", "picture"), paths, strict=True))
    else:
        assert settings.run is not None
        folder = Path(settings.run).expanduser()
        written = dict(zip(("curves", "table"), write_report(folder), strict=True))
        table = epoch_table(read_metrics(folder))
    say(table)
    for label, path in written.items():
        say(f"{label:<15}{path}")
    return tuple(written.values())
