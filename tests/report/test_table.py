from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fat_train.report.table import write_report
from fat_train.types import MissingPathError


def cells(table: str, row: str) -> list[str]:
    """The cells behind a row's head."""
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_report_holds_settings_and_results(write_run: Callable[..., Path]) -> None:
    curves, report = write_report(write_run())
    text = report.read_text()
    assert (curves.name, report.name) == ("curves.png", "report.md")
    assert "![curves](curves.png)" in text
    with Image.open(curves) as image:
        assert image.format == "PNG"
    for row, value in {
        "model": "fat_nano",
        "data": "digits",
        "global batch": "64",
        "seed": "7",
        "epochs finished": "3",
        "training speed": "200 images/s",
        "wall time": "1 min 30 s",
    }.items():
        assert cells(text, row) == [value]


def test_the_best_epoch_stands_beside_the_last(write_run: Callable[..., Path]) -> None:
    text = write_report(write_run(top1=[50.0, 90.0, 80.0]))[1].read_text()
    assert cells(text, "epoch") == ["2", "3"]
    assert cells(text, "val/top1") == ["90.00", "80.00"]
    assert cells(text, "val/top5") == ["95.00", "85.00"]
    assert cells(text, "val/count") == ["360", "360"]
    assert "ema" not in text


def test_the_average_has_a_best_epoch_of_its_own(write_run: Callable[..., Path]) -> None:
    text = write_report(write_run(top1=[50.0, 90.0, 80.0], top1_ema=[95.0, 70.0, 71.0]))[1].read_text()
    assert cells(text, "epoch") == ["1", "2", "3"]
    assert cells(text, "val/top1_ema") == ["95.00", "70.00", "71.00"]


def test_a_run_in_its_first_epoch_has_a_report(write_run: Callable[..., Path]) -> None:
    text = write_report(write_run(top1=[], steps=7))[1].read_text()
    assert "The first epoch has not ended yet." in text
    assert cells(text, "training speed") == ["100 images/s"]


def test_a_run_without_its_config_has_a_report(write_run: Callable[..., Path]) -> None:
    run = write_run()
    (run / "config.yaml").unlink()
    text = write_report(run)[1].read_text()
    assert "| model |" not in text
    assert cells(text, "updates") == ["30"]


def test_a_missing_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="run="):
        write_report(tmp_path / "nowhere")
