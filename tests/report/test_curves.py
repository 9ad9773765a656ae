from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fat_train.report.curves import BLUE, GREEN, ORANGE, draw_curves
from fat_train.report.metrics import read_metrics

NO_RESULTS: list[float] = []


def colours_of(picture: Path) -> set[str]:
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(maxcolors=image.width * image.height)
    return {"#" + bytes(colour).hex().upper() for _, colour in colours}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {BLUE, ORANGE}),
        ({"top1_ema": [40.0, 91.0, 92.0]}, {BLUE, ORANGE, GREEN}),
        ({"top1": [50.0]}, {BLUE, ORANGE}),
        ({"top1": NO_RESULTS, "steps": 5}, {BLUE}),
    ],
    ids=["three epochs", "with EMA", "one epoch", "one row"],
)
def test_a_run_of_any_length_has_its_curves(
    arguments: dict[str, list[float]], expected: set[str], write_run: Callable[..., Path], tmp_path: Path
) -> None:
    picture = draw_curves(read_metrics(write_run(**arguments)), tmp_path / "curves.png")
    with Image.open(picture) as image:
        assert image.size == (1320, 880)
    assert colours_of(picture) & {BLUE, ORANGE, GREEN} == expected


def test_the_same_run_gives_the_same_picture(write_run: Callable[..., Path], tmp_path: Path) -> None:
    metrics = read_metrics(write_run())
    first, second = (draw_curves(metrics, tmp_path / f"{name}.png") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
