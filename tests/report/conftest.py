"""Runs as they lie on disk, written without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fat_train.metric.record import COLUMNS, format_row

STEPS_PER_EPOCH = 10
CONFIG = """\
model: {name: fat_nano}
data: {name: digits, image_px: 64}
schedule: {epochs: 20}
trainer: {global_batch: 64, precision: bf16-mixed}
seed: 7
"""


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run(name, top1=[…])` writes a run that has finished as many epochs as there are results."""

    def write(
        name: str = "nano", top1: list[float] | None = None, top1_ema: list[float] | None = None, steps: int = 0
    ) -> Path:
        top1 = top1 if top1 is not None else [50.0, 90.0, 80.0]
        run = tmp_path / name
        run.mkdir()
        rows = []
        for step in range(1, max(steps, STEPS_PER_EPOCH * len(top1)) + 1):
            epoch = (step - 1) // STEPS_PER_EPOCH
            row = {"epoch": str(epoch), "step": str(step), "lr": str(1e-3 / step), "train/loss": str(3.0 / step)}
            row["images_per_s"] = "100.0"
            if step % 5 == 0:
                rows.append(row)
            if step % STEPS_PER_EPOCH == 0:
                ends = {"val/loss": str(2.0 / step), "val/top1": str(top1[epoch]), "val/top5": str(top1[epoch] + 5)}
                if top1_ema:
                    ends |= {"val/top1_ema": str(top1_ema[epoch]), "val/top5_ema": str(top1_ema[epoch] + 5)}
                rows.append(row | ends | {"val/count": "360", "images_per_s": "200.0", "epoch_s": "30.0"})
        (run / "metrics.csv").write_text(",".join(COLUMNS) + "\n" + "".join(map(format_row, rows)))
        (run / "config.yaml").write_text(CONFIG)
        return run

    return write
