"""report: curves and a table of a run, from what it wrote while it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.report.metrics import read_metrics
from fat_train.report.table import epoch_table, write_report


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """The whole of `conf/report.yaml`."""

    run: str
    """A run's folder."""


def run(tree: DictConfig) -> tuple[Path, Path]:
    """Write curves.png and report.md into the run's folder, print the table; returns the two paths.

    Raises:
        UserError: no such folder, or nothing in it yet.
    """
    settings = resolve(plain(tree), ReportSettings, where="")
    folder = Path(settings.run).expanduser()
    written = write_report(folder)
    say(epoch_table(read_metrics(folder)))
    for label, path in zip(("curves", "table"), written, strict=True):
        say(f"{label:<15}{path}")
    return written
