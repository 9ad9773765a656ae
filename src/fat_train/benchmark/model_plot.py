"""Pictures of networks side by side: speed against top-1, speed side by side, and how the cost grows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from fat_train.benchmark.model_result import Growth, Result
from fat_train.benchmark.model_table import MODE_WORDS, bases
from fat_train.checkpoint.io import replacing

TITLE_LETTERS = 48
"""Of a line over one panel."""
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
LABELLED_SHARE = 0.88
"""Of a panel's width and height that the axes enclose, about."""
FEW_TICKS = 3
Box = tuple[float, float, float, float]
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
        _plain_numbers(axes.xaxis)
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
        axes.set_xlabel(f"images per second over {' or '.join(bases(shown)) or 'nobody'}'s", fontsize=11)
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
        _plain_numbers(axes.yaxis)
        axes.set_xlabel(AXES[axis], fontsize=11)
        axes.set_ylabel("time of a step, ms", fontsize=11)
        axes.legend(frameon=False, fontsize=10, loc="upper left")
    return _save(figure, out_png)


def _figure(panels: int, title: str, height: float = PANEL_INCH[1]) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(PANEL_INCH[0] * panels, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(fill(title, TITLE_LETTERS * panels), fontsize=13, fontweight="bold")
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
    """Beside each point, on the first side where no point and no other label is; of ours at each model's fastest form.

    Ours are placed first; a name that finds no room stays away, the table has it.
    """
    bottom, top = axes.get_ylim()
    left, right = np.log(axes.get_xlim())
    wide, high = 72 * LABELLED_SHARE * PANEL_INCH[0], 72 * LABELLED_SHARE * PANEL_INCH[1]  # of the panel, points

    def place(one: Result) -> tuple[float, float]:
        top1 = one.top1 or bottom
        return wide * (math.log(one.outcome.rate) - left) / (right - left), high * (top1 - bottom) / (top - bottom)

    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in map(place, shown)]
    fastest: dict[str, Result] = {}
    for one in sorted(shown, key=lambda one: one.outcome.rate):
        fastest[one.job.name] = one
    for one in sorted(fastest.values(), key=lambda one: one.job.contestant == "peer"):
        is_ours = one.job.contestant != "peer"
        text, size = re.sub(r"(_patch\d+)?(_window\d+)?_224$", "", one.job.name), 10 if is_ours else 7
        x, y = place(one)
        width, height = (0.62 if is_ours else 0.56) * size * len(text), 1.1 * size
        for across, along in ((7, 0), (-7 - width, 0), (-width / 2, 10), (-width / 2, -10), (5, 8), (5, -8)):
            box = (x + across, y + along - height / 2, x + across + width, y + along + height / 2)
            own = (x - 4, y - 4, x + 4, y + 4)
            if box[0] >= 0 and box[2] <= wide and not any(_overlap(box, other) for other in taken if other != own):
                taken.append(box)
                axes.annotate(
                    text,
                    (box[0] / wide, (y + along) / high),
                    xycoords="axes fraction",
                    va="center",
                    fontsize=size,
                    fontweight="bold" if is_ours else "normal",
                    color=COLOURS["ours"] if is_ours else "#444444",
                )
                break


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _plain_numbers(axis: Axis) -> None:
    """Round numbers along a logarithmic axis, however little of it is shown."""
    low, high = axis.get_view_interval()
    ticks = [step * 10.0**power for power in range(-2, 9) for step in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < FEW_TICKS:
        ticks = [tick for tick in MaxNLocator(FEW_TICKS + 1).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.4g}" if tick < 1000 else f"{tick:,.0f}"))
    axis.set_minor_locator(NullLocator())
