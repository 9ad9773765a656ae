"""The split of a step for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.table import Table

from fat_train.benchmark.step import PARTS, Row, Split

NOTHING = "–"
NOTES = (
    "An update lasts from the asking for its first batch to the asking for the next one's. Each moment of the "
    "training's thread counts for one part; ms is the median of the updates, share is of the sum over all of them.",
    "The gradient's all-reduce, with several devices, runs inside the backward pass. Clipping holds the norms of the "
    "gradient, the optimiser the zeroing of gradients and the schedule; unexplained are Lightning's loop and DDP's "
    "frame of the forward pass.",
    "Device: events on the GPU's own time line, idle time included; that of data wait is the GPU with nothing to do. "
    "Parts in which it gets no work count for the one before. A host that is ahead of the GPU waits for it once an "
    "update, for the update before and among the callbacks, whose host time is then the GPU's.",
    "Not timed: loggers beside metrics.csv, validation, the turns of epochs, checkpoints (benchmark checkpoint).",
)
"""What has to be said under a table."""


def rows_of(split: Split) -> list[tuple[str, ...]]:
    """A row a part, and their sum: name, ms and share on the host, and on the device where there is a time line."""
    sides = (False, True) if split.on_device else (False,)
    rows = []
    for part, name in PARTS.items():
        cells: list[str] = [name]
        for device in sides:
            there = split.occurs(part) and not (device and part == "rest")
            cells += [f"{split.median_ms(part, device=device):,.2f}" if there else NOTHING]
            cells += [f"{split.share(part, device=device):.1%}" if there else NOTHING]
        rows.append(tuple(cells))
    total = ["update"]
    for device in sides:
        values = sorted(sum((row.device_s if device else row.host_s).values()) for row in split.rows)
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        total += [f"{1000 * middle:,.2f}", "100.0%"]
    return [*rows, tuple(total)]


def columns_of(split: Split) -> tuple[str, ...]:
    """Heads of these columns."""
    return ("part", "host ms", "share", "device ms", "share") if split.on_device else ("part", "ms", "share")


def terminal_table(split: Split, title: str) -> Table:
    """For a terminal, the sum apart."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns_of(split)):
        table.add_column(name, justify="right" if number else "left")
    *parts, total = rows_of(split)
    for row in parts:
        table.add_row(*row)
    table.add_section()
    table.add_row(*total)
    return table


def markdown(split: Split, lines: Sequence[str]) -> str:
    """The same as a text to keep, with `lines` (machine, verdict, rates) over the notes."""
    columns = columns_of(split)
    heads = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    rows = ["| " + " | ".join(row) + " |" for row in rows_of(split)]
    return "\n".join([*heads, *rows, "", *(f"- {line}" for line in (*lines, *NOTES))]) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """A line an update: its number, and milliseconds of each part on the host, and on the device where there is one."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    sides = ("host", "device") if rows and rows[0].device_s else ("host",)
    writer.writerow(("update", *(f"{side}_{part}_ms" for side in sides for part in PARTS)))
    for row in rows:
        numbers = (
            {"host": row.host_s, "device": row.device_s}[side].get(part, 0.0) for side in sides for part in PARTS
        )
        writer.writerow((row.update, *(f"{1000 * seconds:.4f}" for seconds in numbers)))
    return text.getvalue()
