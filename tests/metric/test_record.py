from __future__ import annotations

import math
from pathlib import Path

import pytest

from fat_train.metric.record import COLUMNS, format_duration, format_row, is_epoch_row, read_rows

HEADER = ",".join(COLUMNS) + "\n"


def test_every_bit_of_a_number_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + format_row({"step": "1", "train/loss": repr(math.pi)}))
    (row,) = read_rows(path)
    assert float(row["train/loss"]) == math.pi
    assert row["val/top1"] == ""
    assert list(row) == list(COLUMNS)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    whole = format_row({"step": "1"}) + format_row({"step": "2", "epoch_s": "3.0"})
    path.write_text(HEADER + whole + format_row({"step": "3"}).rstrip("\n"))
    rows = read_rows(path)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert [is_epoch_row(row) for row in rows] == [False, True]


def test_columns_that_an_older_version_lacked_are_blank(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n0,7\n")
    assert read_rows(path) == [dict.fromkeys(COLUMNS, "") | {"epoch": "0", "step": "7"}]


@pytest.mark.parametrize("text", ["", "epoch,step", HEADER])
def test_a_file_without_rows_has_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(text)
    assert read_rows(path) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (26400, "7 h 20 min"),
        (86400, "1 d 00 h"),
        (97200, "1 d 03 h"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
