"""A sweep's runs beside each other, from what each wrote while it trained: sweep.md, sweep.csv and sweep.png."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fat_train.checkpoint.io import write_atomically
from fat_train.report.manifest import read_manifest
from fat_train.report.sweep_plot import draw_sweep
from fat_train.report.sweep_rows import FINISHED, Result, Row, When, best_row, group, read_result, shown
from fat_train.report.table import NOTHING, markdown

TABLE_FILE, CSV_FILE, PLOT_FILE = "sweep.md", "sweep.csv", "sweep.png"
SPREAD = (
    "± is the standard deviation over seeds (n − 1). "
    "Runs that have not finished count only where no run of the row has finished."
)


def write_sweep_report(sweep: Path) -> tuple[str, tuple[Path, Path, Path]]:
    """Make `sweep.md`, `sweep.csv` and `sweep.png` in the sweep's folder.

    Returns:
        The table of the sweep, and where the three files lie.

    Raises:
        MissingPathError, UserError: see `read_manifest`.
    """
    manifest = read_manifest(sweep)
    results = [read_result(sweep, cell) for cell in manifest.cells]
    rows = group(manifest, results)
    table, names = sweep_table(rows, shown(results)), shown(results)
    md, numbers, plot = (sweep / name for name in (TABLE_FILE, CSV_FILE, PLOT_FILE))
    write_atomically(numbers, sweep_csv(rows, names))
    title = sweep.resolve().name
    draw_sweep(title, rows, names, plot)
    picture = f"![{title}]({PLOT_FILE})"
    write_atomically(md, "\n\n".join([f"# {title}", table, SPREAD, picture, "## Runs", cell_table(results, {})]) + "\n")
    return table, (md, numbers, plot)


def sweep_table(rows: Sequence[Row], names: Sequence[str]) -> str:
    """A row a combination of values: mean and spread of each series, the best one in bold."""
    keys = list(rows[0].values)
    several = any(len(row.results) > 1 for row in rows)
    best = {name: best_row(rows, name) for name in names}
    heads = [*keys, *(["seeds"] if several else [])]
    heads += [f"{when} {name}" for name in names for when in ("best", "last")] + ["epochs", "state"]
    lines = []
    for row in rows:
        line = [row.values[key] for key in keys] + ([str(len(row.counted))] if several else [])
        for name in names:
            text = _with_spread(row, "best", name)
            line += [f"**{text}**" if row is best[name] and len(rows) > 1 else text, _with_spread(row, "last", name)]
        lines.append([*line, row.progress, row.state])
    return markdown(heads, lines)


def sweep_csv(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The numbers of `sweep_table`, all bits of them."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    whens: tuple[When, ...] = ("best", "last")
    heads = [f"{when} {name} {what}" for name in names for when in whens for what in ("mean", "std")]
    out.writerow([*rows[0].values, "runs", "runs finished", "runs counted", *heads])
    for row in rows:
        finished = sum(one.state == FINISHED for one in row.results)
        numbers = [
            number for name in names for when in whens for number in (row.mean(when, name), row.spread(when, name))
        ]
        counts = (len(row.results), finished, len(row.counted))
        out.writerow([*row.values.values(), *counts, *("" if np.isnan(number) else number for number in numbers)])
    return text.getvalue()


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


def percent(value: float) -> str:
    """Two decimals, or a dash for NaN."""
    return f"{value:.2f}" if np.isfinite(value) else NOTHING


def _with_spread(row: Row, when: When, name: str) -> str:
    spread = row.spread(when, name)
    return percent(row.mean(when, name)) + (f" ± {spread:.2f}" if np.isfinite(spread) else "")
