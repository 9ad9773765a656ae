"""The split of a step as a picture: the mean update as one bar, and every update beside its neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fat_train.benchmark.step import PARTS, Row, Split
from fat_train.checkpoint.io import replacing

SIZE_INCH = (12.0, 6.5)
DPI = 110
COLOURS = dict(
    zip(
        PARTS,
        [
            "#D55E00",
            "#F0E442",
            "#56B4E9",
            "#0072B2",
            "#CC79A7",
            "#12395B",
            "#7A4E00",
            "#009E73",
            "#9BDCC4",
            "#E69F00",
            "#C8C8C8",
        ],
        strict=True,
    )
)
"""Okabe and Ito's where they last, and shades of theirs."""
DARK = {"data", "forward", "backward", "clip", "optimizer"}
LABEL_FROM_SHARE = 0.05


def draw_split(split: Split, title: str, out_png: Path) -> Path:
    """Draw the mean update, on the host and on the device where there is a time line, and all updates as they came.

    Args:
        split: what was measured.
        title: of the picture.
        out_png: its place; it is replaced.

    Returns:
        `out_png`.
    """
    figure = Figure(figsize=SIZE_INCH, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    sides = ["host", "device"] if split.on_device else ["host"]
    mean, each = figure.subplots(2, 1, height_ratios=[len(sides), 4])
    for height, side in enumerate(sides):
        left = 0.0
        for part in PARTS:
            ms = 1000 * float(np.mean([_side(row, side).get(part, 0.0) for row in split.rows]))
            label = PARTS[part] if height == 0 else None
            mean.barh(height, ms, left=left, color=COLOURS[part], edgecolor="white", linewidth=0.5, label=label)
            share = split.share(part, device=side == "device")
            if share >= LABEL_FROM_SHARE:
                ink = "white" if part in DARK else "black"
                mean.text(left + ms / 2, height, f"{ms:,.1f}\n{share:.0%}", ha="center", va="center", color=ink)
            left += ms
    mean.set_yticks(range(len(sides)), sides if split.on_device else [""])
    mean.tick_params(axis="y", length=0)
    mean.invert_yaxis()
    mean.set_xlim(left=0)
    mean.set_title("mean update, ms", fontsize=12, loc="left")
    _all_updates(each, split, sides[-1])
    for axes in (mean, each):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*mean.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=10)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    with replacing(out_png) as beside:
        figure.savefig(beside, format="png")
    return out_png


def _all_updates(axes: Axes, split: Split, side: str) -> None:
    numbers = np.array([row.update for row in split.rows])
    bottom = np.zeros(len(numbers))
    for part in PARTS:
        ms = np.array([1000 * _side(row, side).get(part, 0.0) for row in split.rows])
        axes.bar(numbers, ms, width=1.0, bottom=bottom, color=COLOURS[part])
        bottom += ms
    axes.set_title(f"every update that counts, ms ({side})", fontsize=12, loc="left")
    axes.set_xlabel("update of the run")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _side(row: Row, side: str) -> dict[str, float]:
    return row.device_s if side == "device" else row.host_s
