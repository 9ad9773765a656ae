"""Markdown tables of one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fat_train.checkpoint.io import write_atomically
from fat_train.metric.record import format_duration
from fat_train.report.curves import draw_curves
from fat_train.report.metrics import CONFIG_FILE, Metrics, read_metrics

CURVES_FILE = "curves.png"
REPORT_FILE = "report.md"
NOTHING = "–"

SETTINGS = (
    ("model", "model.name"),
    ("data", "data.name"),
    ("input", "data.image_px"),
    ("epochs asked for", "schedule.epochs"),
    ("global batch", "trainer.global_batch"),
    ("precision", "trainer.precision"),
    ("seed", "seed"),
)
"""Rows that the run's configuration gives: label, and where the value stands there."""

RESULTS = (
    ("val/top1", ".2f"),
    ("val/top5", ".2f"),
    ("val/top1_ema", ".2f"),
    ("val/top5_ema", ".2f"),
    ("val/loss", ".4f"),
    ("train/loss", ".4f"),
    ("val/count", ",.0f"),
    ("lr", ".3e"),
    ("images_per_s", ",.0f"),
    ("epoch_s", ",.1f"),
)
"""Columns that the epochs' table shows, and how."""


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Make `curves.png` and `report.md` in the run's folder, and say where they are.

    Args:
        run_dir: the run's folder.

    Raises:
        MissingPathError, UserError: see `read_metrics`.
    """
    metrics = read_metrics(run_dir)
    curves = draw_curves(metrics, run_dir / CURVES_FILE)
    report = run_dir / REPORT_FILE
    sections = [f"# {run_dir.resolve().name}", run_table(metrics), epoch_table(metrics)]
    write_atomically(report, "\n\n".join([*sections, f"![curves]({CURVES_FILE})"]) + "\n")
    return curves, report


def run_table(metrics: Metrics) -> str:
    """Who ran, how long, how fast: a row a fact."""
    config = _read_config(metrics.run_dir)
    rows = [(label, str(value)) for label, key in SETTINGS if (value := OmegaConf.select(config, key)) is not None]
    rows += [
        ("updates", f"{metrics.columns['step'].max():,.0f}"),
        ("epochs finished", str(int(metrics.is_epoch.sum()))),
        ("training speed", f"{_speed(metrics):,.0f} images/s"),
        ("wall time", format_duration(_wall_s(metrics)) if metrics.is_epoch.any() else NOTHING),
    ]
    return _markdown(("", metrics.run_dir.resolve().name), rows)


def epoch_table(metrics: Metrics) -> str:
    """The best epoch beside the last one, a row a number; epochs count from 1."""
    if not metrics.is_epoch.any():
        return "The first epoch has not ended yet."
    last = int(metrics.is_epoch.sum()) - 1
    best = _best_epoch(metrics, "val/top1")
    best_ema = _best_epoch(metrics, "val/top1_ema")
    picked = {"last epoch": last}
    if best is not None:
        picked = {"best val/top1": best} | picked
    if best_ema is not None:
        picked = {"best val/top1_ema": best_ema} | picked
    rows = [("epoch", *(str(int(metrics.epochs("epoch")[at]) + 1) for at in picked.values()))]
    for name, form in RESULTS:
        values = metrics.epochs(name)
        if np.isfinite(values).any():
            rows.append((name, *(_cell(values[at], form) for at in picked.values())))
    return _markdown(("", *picked), rows)


def _read_config(run_dir: Path) -> Any:
    path = run_dir / CONFIG_FILE
    return OmegaConf.load(path) if path.is_file() else OmegaConf.create()


def _best_epoch(metrics: Metrics, name: str) -> int | None:
    values = metrics.epochs(name)
    return int(np.nanargmax(values)) if np.isfinite(values).any() else None


def _top(metrics: Metrics, name: str) -> float:
    at = _best_epoch(metrics, name)
    return np.nan if at is None else float(metrics.epochs(name)[at])


def _speed(metrics: Metrics) -> float:
    ends = metrics.epochs("images_per_s")
    return float(np.median(ends if len(ends) else metrics.between("images_per_s")))


def _wall_s(metrics: Metrics) -> float:
    return float(np.sum(metrics.epochs("epoch_s")))


def _cell(value: float, form: str) -> str:
    return format(value, form) if np.isfinite(value) else NOTHING


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
