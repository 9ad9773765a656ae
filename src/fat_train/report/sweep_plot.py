"""The picture of a sweep: top-1 against what was swept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

from fat_train.report.curves import BLUE, DPI, GREEN, GRID, ORANGE
from fat_train.report.manifest import as_number
from fat_train.report.sweep_rows import FINISHED, SEED, UNFINISHED, Result, Row, best_row, in_order

PANEL_INCH = (8.0, 5.2)
COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's but for yellow, which is faint on white."""
DASHES, MARKERS = ("-", "--", ":", "-."), "os^Dv"
TICKS_AT_MOST = 12
DECADE = 10.0
LONG_LABELS = 60
MARGIN = 0.04
TITLES = {"val/top1": "Best top-1", "val/top1_ema": "Best top-1, averaged weights (EMA)"}


def draw_sweep(title: str, rows: Sequence[Row], names: Sequence[str], out_png: Path) -> Path:
    """Draw each series of `names` in a panel: a dot a run, a line through the means over seeds, their spread.

    The horizontal axis is the swept key with the most numbers, or else the most words; there is one line for each
    combination of the other keys. Dots of unfinished runs are hollow.

    Args:
        title: the sweep's name.
        rows: at least one.
        names: of `SERIES`.
        out_png: the picture's place; it is replaced.

    Returns:
        `out_png`.
    """
    figure = Figure(figsize=(PANEL_INCH[0] * len(names), PANEL_INCH[1]), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        if rows[0].values:
            _draw_values(axes, rows, name)
        else:
            _draw_seeds(axes, rows[0], name)
        if not any(row.seen("best", name) for row in rows):
            axes.text(0.5, 0.5, "not validated yet", transform=axes.transAxes, ha="center", color="#666666")
            axes.set_yticks([])
        axes.set_ylabel("correct, %", fontsize=11)
        axes.grid(visible=True, color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(_key_to_signs(rows), fontsize=9, color="#666666")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    figure.savefig(out_png)
    return out_png


def _draw_values(axes: Axes, rows: Sequence[Row], name: str) -> None:
    key = _axis_key(rows)
    written = sorted({row.values[key] for row in rows}, key=in_order)
    numbers = [as_number(value) for value in written]
    is_number = None not in numbers
    x_of = {
        value: float(at if number is None or not is_number else number)
        for at, (value, number) in enumerate(zip(written, numbers, strict=True))
    }
    lines: dict[str, list[Row]] = {}
    for row in rows:
        others = ", ".join(f"{_short(other)}={value}" for other, value in row.values.items() if other != key)
        lines.setdefault(others, []).append(row)
    for turn, (label, members) in enumerate(lines.items()):
        color = COLOURS[turn % len(COLOURS)]
        drawn = [row for row in members if np.isfinite(row.mean("best", name))]
        spread = np.nan_to_num([row.spread("best", name) for row in drawn])
        axes.errorbar(
            [x_of[row.values[key]] for row in drawn],
            [row.mean("best", name) for row in drawn],
            yerr=spread if spread.any() else None,
            color=color,
            ls=DASHES[turn // len(COLOURS) % len(DASHES)] if is_number else "none",
            lw=1.8,
            elinewidth=1.2,
            marker=MARKERS[turn % len(MARKERS)],
            ms=6,
            capsize=4,
            label=label or None,
        )
        for row in drawn:
            several = len(row.results) > 1
            if several or row.state != FINISHED:
                places = [x_of[row.values[key]]] * len(row.results)
                _dots(axes, places, row.results, name, color, size=4.0 if several else 6.0)
    best = best_row(rows, name)
    if best is not None:
        at = x_of[best.values[key]], best.mean("best", name)
        axes.plot(*at, marker="o", ms=13, mfc="none", mec="black", mew=1.2)
    _scale(axes, written, numbers)
    axes.set_xlabel(key, fontsize=11)
    axes.set_title(TITLES[name] + _said(best, name), fontsize=12, loc="left")
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=10, ncols=1 + len(lines) // 8)


def _draw_seeds(axes: Axes, row: Row, name: str) -> None:
    """Nothing but seeds was swept: a dot each, with mean and spread as a band."""
    results = sorted(row.results, key=lambda one: in_order(one.cell.values[SEED]))
    _dots(axes, range(len(results)), results, name, BLUE)
    mean, spread = row.mean("best", name), row.spread("best", name)
    if np.isfinite(mean):
        axes.axhline(mean, color=BLUE, lw=1.8, label="mean")
    if np.isfinite(spread):
        axes.axhspan(mean - spread, mean + spread, color=BLUE, alpha=0.12, lw=0, label="± standard deviation")
        axes.legend(frameon=False, fontsize=10)
    axes.set_xticks(range(len(results)), [one.cell.values[SEED] for one in results])
    axes.set_xlim(-0.5, len(results) - 0.5)
    axes.set_xlabel("seed", fontsize=11)
    said = f": {mean:.2f} %" if np.isfinite(mean) else ""
    axes.set_title(TITLES[name] + said + (f" ± {spread:.2f}" if np.isfinite(spread) else ""), fontsize=12, loc="left")


def _dots(axes: Axes, x: Sequence[float], results: Sequence[Result], name: str, color: str, size: float = 6.0) -> None:
    for at, one in zip(x, results, strict=True):
        finished = one.state == FINISHED
        fill, alpha = (color, 0.6) if finished else ("white", 1.0)
        axes.plot(
            at, one.best[name], marker="o", ms=size, mfc=fill, mec=color, mew=1.2, alpha=alpha, ls="none", zorder=3
        )


def _scale(axes: Axes, written: Sequence[str], numbers: Sequence[float | None]) -> None:
    """Ticks where the values are; a logarithmic axis where that spreads them more evenly."""
    known = np.array([number for number in numbers if number is not None])
    if len(known) < len(numbers):
        turned = {"rotation": 20, "ha": "right"} if sum(map(len, written)) > LONG_LABELS else {}
        axes.set_xticks(range(len(written)), written, **turned)  # type: ignore[arg-type]
        axes.set_xlim(-0.5, len(written) - 0.5)
        return
    if _is_logarithmic(known):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.xaxis.set_minor_formatter(NullFormatter())
        margin = (known[-1] / known[0]) ** MARGIN
        axes.set_xlim(known[0] / margin, known[-1] * margin)
    else:
        margin = MARGIN * (known[-1] - known[0]) or 0.5
        axes.set_xlim(known[0] - margin, known[-1] + margin)
    if len(written) <= TICKS_AT_MOST:
        axes.set_xticks(known, written)


def _is_logarithmic(x: Float64[np.ndarray, " n"]) -> bool:
    if len(x) < 2 or x[0] <= 0 or x[-1] / x[0] < DECADE:
        return False
    linear, logarithmic = np.diff(x), np.diff(np.log(x))
    return bool(np.std(logarithmic) / np.mean(logarithmic) <= np.std(linear) / np.mean(linear))


def _axis_key(rows: Sequence[Row]) -> str:
    """The key whose values are all numbers and the most; where there is none, the one with the most words."""

    def rank(key: str) -> tuple[bool, int]:
        values = {row.values[key] for row in rows}
        return all(as_number(value) is not None for value in values), len(values)

    return max(rows[0].values, key=rank)


def _said(best: Row | None, name: str) -> str:
    if best is None:
        return ""
    spread = best.spread("best", name)
    number = f"{best.mean('best', name):.2f} %" + (f" ± {spread:.2f}" if np.isfinite(spread) else "")
    return f": {number} at " + ", ".join(f"{_short(key)}={value}" for key, value in best.values.items())


def _key_to_signs(rows: Sequence[Row]) -> str:
    runs = [one for row in rows for one in row.results]
    signs = []
    if rows[0].values and len(runs) > len(rows):
        signs += ["small dots: runs, one a seed", "bars: standard deviation over seeds"]
    if any(one.state == UNFINISHED for one in runs):
        signs.append("hollow: not finished")
    if rows[0].values and any(one.epochs for one in runs):
        signs.append("ring: the best")
    return " · ".join(signs)


def _short(key: str) -> str:
    return key.rpartition(".")[2]
