"""A run's `metrics.csv`: its columns, how a row is read back, and how a time is written for people.

The writer (`fat_train.callback.metrics_csv`) and the readers (`fat_train.report`) meet here and nowhere else.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

COLUMNS = (
    "epoch",
    "step",
    "lr",
    "train/loss",
    "val/loss",
    "val/top1",
    "val/top5",
    "val/top1_ema",
    "val/top5_ema",
    "val/count",
    "images_per_s",
    "epoch_s",
)
"""`epoch` counts from 0, `step` counts finished updates, `val/*` are percent, `images_per_s` is of the whole job.

A row written between two ends of an epoch leaves `val/*` and `epoch_s` blank; only an epoch's own row has `epoch_s`.
"""
VALIDATION_COLUMNS = tuple(name for name in COLUMNS if name.startswith("val/"))
COUNT_COLUMNS = ("epoch", "step", "val/count")
"""Columns that hold whole numbers."""

Row = dict[str, str]
"""One row as text, a cell a column, blank where there is nothing; numbers round-trip through `float` unchanged."""


def format_row(row: Row) -> str:
    """One line of the file, with its line end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow([row.get(name, "") for name in COLUMNS])
    return line.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Rows of a `metrics.csv`, in order; a line that a kill or a full disk cut short is left out.

    Args:
        path: the file; columns that an older version did not write come back blank.
    """
    text = path.read_text(encoding="utf-8")
    lines = csv.reader(text[: text.rfind("\n") + 1].splitlines())
    header = next(lines, [])
    rows = [dict(zip(header, cells, strict=True)) for cells in lines if len(cells) == len(header)]
    return [{name: row.get(name, "") for name in COLUMNS} for row in rows if row.get("step", "").isdecimal()]


def is_epoch_row(row: Row) -> bool:
    """Whether the row stands for a whole epoch (and not for the last updates alone)."""
    return row["epoch_s"] != ""


def format_duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `7 h 20 min`, `1 d 03 h`: two units at most, rounded to the smaller one."""
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"
