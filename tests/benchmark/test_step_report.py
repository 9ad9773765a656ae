"""Table, Markdown, CSV and picture hold every part."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from fat_train.benchmark.step import PARTS, Row, Split
from fat_train.benchmark.step_plot import COLOURS, draw_split
from fat_train.benchmark.step_table import as_csv, markdown, rows_of, terminal_table

HOST = dict(zip(PARTS, (0.1, 0.001, 0.01, 0.2, 0.002, 0.4, 0.01, 0.05, 0.02, 0.01, 0.007), strict=True))
ON_CPU = Split([Row(number, HOST) for number in (4, 5)], images=8)
ON_GPU = Split([Row(number, HOST, {part: 2 * s for part, s in HOST.items() if part != "rest"}) for number in (4, 5)], 8)
WITHOUT_EMA = Split([Row(4, {part: s for part, s in HOST.items() if part != "ema"})], images=8)


@pytest.mark.parametrize("split", [ON_CPU, ON_GPU])
def test_the_table_has_a_row_a_part_and_their_sum(split: Split) -> None:
    rows = rows_of(split)
    assert [row[0] for row in rows] == [*PARTS.values(), "update"]
    assert rows[5][:3] == ("backward", "400.00", "49.4%")
    assert rows[-1][1:3] == ("810.00", "100.0%")
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_table(split, "a run"))
    text = markdown(split, ["verdict: nothing"])
    for name in PARTS.values():
        assert name in console.file.getvalue()  # type: ignore[attr-defined]
        assert f"| {name} |" in text
    assert "- verdict: nothing" in text
    assert ("device ms" in text) == split.on_device


def test_a_device_has_a_column_of_its_own_and_no_unexplained_time() -> None:
    rows = rows_of(ON_GPU)
    assert rows[5] == ("backward", "400.00", "49.4%", "800.00", "49.8%")
    assert rows[-2][3:] == ("–", "–")


def test_what_a_run_does_not_have_has_no_number() -> None:
    assert {name: cells for name, *cells in rows_of(WITHOUT_EMA)}["EMA"] == ["–", "–"]


@pytest.mark.parametrize(("split", "columns"), [(ON_CPU, 12), (ON_GPU, 23)])
def test_the_csv_has_a_line_an_update(split: Split, columns: int) -> None:
    head, *lines = (line.split(",") for line in as_csv(split.rows).splitlines())
    assert len(head) == columns
    assert [line[0] for line in lines] == ["4", "5"]
    assert lines[0][head.index("host_backward_ms")] == "400.0000"


@pytest.mark.parametrize("split", [ON_CPU, ON_GPU])
def test_the_picture_shows_every_part_in_a_colour_of_its_own(split: Split, tmp_path: Path) -> None:
    with Image.open(draw_split(split, "a run", tmp_path / "split.png")) as picture:
        pixels = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert len(set(COLOURS.values())) == len(PARTS)
    shown = {name: tuple(bytes.fromhex(colour[1:])) in pixels for name, colour in COLOURS.items()}
    assert all(shown.values()), shown
