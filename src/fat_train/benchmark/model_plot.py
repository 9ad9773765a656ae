"""Pictures of networks side by side: speed against top-1, speed against the reference, and how the cost grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from fat_train.benchmark.model_result import Growth, Result
from fat_train.benchmark.model_table import MODE_WORDS
from fat_train.checkpoint.io import replacing

PANEL_INCH = (7.5, 5.4)
DPI = 110
COLOURS = {
    "reference": "#444444",
    "reference_compiled": "#E69F00",
    "ours": "#0072B2",
    "ours_compiled": "#D55E00",
    "ours_folded": "#009E73",
    "ours_folded_compiled": "#CC79A7",
    "peer": "#888888",
}
"""Of Okabe and Ito; every contestant has its marker too."""
MARKERS = dict(zip(COLOURS, "xdo^sPD", strict=True))
GRID = "#EAEAEA"
LABEL_APART = 0.035
"""Least distance between two labels, as a share of the panel's height."""
FEW_TICKS = 3
AXES = {"batch": "images of a batch", "pixels": "pixels of an image", "blocks": "blocks of the network"}


def draw_accuracy(results: Sequence[Result], title: str, out_png: Path) -> Path | None:
    """Draw img/s against the published top-1, a panel a mode; nothing if no result has a top-1.

    Args:
        results: all of them.
        title: over the panels.
        out_png: the picture's place; it is replaced.

    Returns:
        `out_png`, or None.
    """
    modes = _modes_of([result for result in results if result.top1 is not None and result.finished])
    if not modes:
        return None
    figure, panels = _figure(len(modes), title)
    for axes, mode in zip(panels, modes, strict=True):
        shown = [one for one in results if one.job.mode == mode and one.finished and one.top1 is not None]
        for name, colour in COLOURS.items():
            own = [one for one in shown if one.job.contestant == name]
            if own:
                label = "timm's models" if name == "peer" else name
                points = np.array([(one.outcome.rate, one.top1) for one in own], dtype=np.float64)
                axes.plot(*points.T, MARKERS[name], color=colour, ms=7, label=label)
        axes.set_xscale("log")
        axes.margins(0.12)
        _label_points(axes, shown)
        _plain_numbers(axes)
        axes.set_title(MODE_WORDS[mode], fontsize=12, loc="left")
        axes.set_xlabel("images per second", fontsize=11)
        axes.set_ylabel("published top-1, %", fontsize=11)
        axes.legend(frameon=False, fontsize=9, loc="best")
    return _save(figure, out_png)


def draw_speed(results: Sequence[Result], title: str, out_png: Path) -> Path:
    """Draw the rate of each contestant over the reference's as bars, a panel a mode, with the spread of the rounds.

    Args:
        results: all of them.
        title: over the panels.
        out_png: the picture's place; it is replaced.

    Returns:
        `out_png`.
    """
    modes = _modes_of(results)
    rows = max(sum(one.job.mode == mode for one in results) for mode in modes)
    figure, panels = _figure(len(modes), title, height=1.8 + 0.34 * rows)
    for axes, mode in zip(panels, modes, strict=True):
        shown = [one for one in results if one.job.mode == mode]
        heights = np.arange(len(shown))[::-1]
        for height, one in zip(heights, shown, strict=True):
            if math.isnan(one.ratio):
                reason = one.outcome.why_not or "no reference beside it"
                axes.text(0.02, height, reason[:60], va="center", fontsize=8, color="#666666")
                continue
            low, high = one.ratio_span
            axes.barh(height, one.ratio, color=COLOURS[one.job.contestant], height=0.7)
            axes.plot([low, high], [height, height], color="#555555", lw=1.4)
            text = f" {one.ratio:.2f}   {one.outcome.rate:,.{1 if one.outcome.rate < 100 else 0}f} img/s"
            axes.text(max(high, one.ratio), height, text, va="center", fontsize=9)
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_yticks(heights, [one.who for one in shown], fontsize=9)
        axes.axvline(1.0, color="#555555", lw=0.8, ls=":")
        axes.set_xlim(0, 1.45 * max([1.0, *(one.ratio_span[1] for one in shown if not math.isnan(one.ratio))]))
        axes.set_title(MODE_WORDS[mode], fontsize=12, loc="left")
        axes.set_xlabel("images per second over the plain reference's", fontsize=11)
        axes.grid(visible=False, axis="y")
    return _save(figure, out_png)


def draw_growth(growths: Mapping[str, Sequence[Growth]], title: str, out_png: Path) -> Path:
    """Draw the time of a step against each axis, both logarithmic, with the fitted exponent.

    Args:
        growths: axis -> a growth a contestant.
        title: over the panels.
        out_png: the picture's place; it is replaced.

    Returns:
        `out_png`.
    """
    figure, panels = _figure(len(growths), title)
    for axes, (axis, several) in zip(panels, growths.items(), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for growth in several:
            if not growth.sizes:
                continue
            colour, marker = COLOURS[growth.contestant], MARKERS[growth.contestant]
            known = not math.isnan(growth.exponent)
            label = f"{growth.contestant}: {axis}^{growth.exponent:.2f}" if known else growth.contestant
            axes.plot(growth.sizes, growth.step_ms, marker, color=colour, ms=7, label=label)
            if known:
                sizes = np.array(growth.sizes)
                offset = np.mean(np.log(growth.step_ms)) - growth.exponent * np.mean(np.log(sizes))
                axes.plot(sizes, np.exp(offset) * sizes**growth.exponent, color=colour, lw=1.3)
        sizes_of_all = sorted({size for growth in several for size in growth.sizes})
        axes.xaxis.set_major_locator(FixedLocator(sizes_of_all))
        if axis == "pixels":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{math.sqrt(size):.0f}²"))
        else:
            axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(AXES[axis], fontsize=11)
        axes.set_ylabel("time of a step, ms", fontsize=11)
        axes.legend(frameon=False, fontsize=10, loc="upper left")
    return _save(figure, out_png)


def _figure(panels: int, title: str, height: float = PANEL_INCH[1]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(PANEL_INCH[0] * panels, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    made = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in made:
        axes.grid(visible=True, color=GRID, lw=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, made


def _save(figure: Figure, out_png: Path) -> Path:
    with replacing(out_png) as beside:
        figure.savefig(beside, format="png")
    return out_png


def _modes_of(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.job.mode for result in results))


def _label_points(axes: Axes, shown: Sequence[Result]) -> None:
    """Beside each point; of ours one label a model, at its fastest form. Labels that would touch move upwards."""
    fastest: dict[str, Result] = {}
    for one in shown:
        if one.job.name not in fastest or one.outcome.rate > fastest[one.job.name].outcome.rate:
            fastest[one.job.name] = one
    bottom, top = axes.get_ylim()
    left, right = np.log(axes.get_xlim())
    taken: list[tuple[float, float]] = []
    for one in sorted(fastest.values(), key=lambda one: one.top1 or 0.0):
        x = (math.log(one.outcome.rate) - left) / (right - left)
        y = ((one.top1 or 0.0) - bottom) / (top - bottom)
        while any(abs(y - other) < LABEL_APART and abs(x - beside) < 0.3 for beside, other in taken):
            y += LABEL_APART / 4
        taken.append((x, y))
        is_ours = one.job.contestant != "peer"
        axes.annotate(
            one.job.name.removesuffix("_224"),
            (one.outcome.rate, one.top1 or 0.0),
            xytext=(x + 0.012, y),
            textcoords="axes fraction",
            va="center",
            fontsize=10 if is_ours else 7,
            fontweight="bold" if is_ours else "normal",
            color=COLOURS["ours"] if is_ours else "#444444",
        )


def _plain_numbers(axes: Axes) -> None:
    """Round numbers along a logarithmic axis, however little of it is shown."""
    low, high = axes.get_xlim()
    ticks = [step * 10.0**power for power in range(-2, 7) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < FEW_TICKS:
        ticks = [tick for tick in MaxNLocator(FEW_TICKS + 1).tick_values(low, high) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
