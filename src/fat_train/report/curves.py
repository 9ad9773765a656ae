"""The curves of one run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float64
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fat_train.checkpoint.io import replacing
from fat_train.report.metrics import Metrics

SIZE_INCH = (12.0, 8.0)
DPI = 110
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
"""Colours of Okabe and Ito, which stay apart for every kind of colour vision; the lines' dashes differ too."""
GREY, GRID = "#BBBBBB", "#EAEAEA"
DOTS_AT_MOST = 40
MANY_POINTS = 500

Corner = Literal["upper right", "lower right"]


def draw_curves(metrics: Metrics, out_png: Path) -> Path:
    """Draw loss, top-1, top-5 and learning rate against the epoch, 1320×880 px.

    Args:
        metrics: a run, of one row or more.
        out_png: the picture's place; it is replaced.

    Returns:
        `out_png`.
    """
    figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    loss, top1, rate, top5 = figure.subplots(2, 2, sharex=True).ravel()
    steps_of_unit = metrics.steps_per_epoch or 1.0
    x_steps, x_epochs = metrics.between("step") / steps_of_unit, metrics.epochs("step") / steps_of_unit

    thin = 0.6 if len(x_steps) > MANY_POINTS else 1.2
    _line(loss, x_steps, metrics.between("train/loss"), color=GREY, width=thin, label="train, single updates")
    _line(loss, x_epochs, metrics.epochs("train/loss"), color=BLUE, label="train, mean of the epoch")
    _line(loss, x_epochs, metrics.epochs("val/loss"), color=ORANGE, dashes="--", label="validation")
    _finish(loss, "Loss", "cross-entropy, nats", "upper right")

    for axes, name, title in ((top1, "val/top1", "Top-1"), (top5, "val/top5", "Top-5")):
        raw, averaged = metrics.epochs(name), metrics.epochs(f"{name}_ema")
        _line(axes, x_epochs, raw, color=ORANGE, dashes="--", label="validation")
        _line(axes, x_epochs, averaged, color=GREEN, label="validation, averaged weights (EMA)")
        _finish(axes, title + _best(axes, x_epochs, raw, averaged), "correct, %", "lower right")

    x_rows = metrics.columns["step"] / steps_of_unit
    order = np.argsort(x_rows, kind="stable")
    _line(rate, x_rows[order], metrics.columns["lr"][order], color=BLUE)
    rate.yaxis.set_major_formatter("{x:g}")
    _finish(rate, "Learning rate", "learning rate of an update", "upper right")

    for axes in (rate, top5):
        axes.set_xlabel("epoch" if metrics.steps_per_epoch else "update (the first epoch has not ended)", fontsize=11)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle(metrics.run_dir.resolve().name, fontsize=15, fontweight="bold")
    with replacing(out_png) as beside:
        figure.savefig(beside, format="png")
    return out_png


def _line(
    axes: Axes,
    x: Float64[np.ndarray, " n"],
    y: Float64[np.ndarray, " n"],
    *,
    color: str,
    dashes: str = "-",
    width: float = 1.8,
    label: str | None = None,
) -> None:
    known = np.isfinite(y)
    if known.any():
        points = known.sum()
        marker = "o" if points == 1 or (points <= DOTS_AT_MOST and label) else ""
        axes.plot(x[known], y[known], color=color, ls=dashes, lw=width, marker=marker, ms=2.2 * width, label=label)


def _best(axes: Axes, x: Float64[np.ndarray, " n"], *curves: Float64[np.ndarray, " n"]) -> str:
    """Circle the highest point of all curves, and say what it is; blank where there is none."""
    known = [y for y in curves if np.isfinite(y).any()]
    if not known:
        axes.text(0.5, 0.5, "not validated yet", transform=axes.transAxes, ha="center", color="#666666")
        axes.set_yticks([])
        return ""
    best = max(known, key=np.nanmax)
    at = int(np.nanargmax(best))
    axes.plot(x[at], best[at], marker="o", ms=11, mfc="none", mec="black", mew=1.2)
    return f": best {best[at]:.2f} % after epoch {x[at]:.0f}"


def _finish(axes: Axes, title: str, unit: str, legend_at: Corner) -> None:
    axes.set_title(title, fontsize=13, loc="left")
    axes.set_ylabel(unit, fontsize=11)
    axes.grid(visible=True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=10, loc=legend_at)
