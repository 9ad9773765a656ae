"""The table says what was measured, and nothing where nothing was."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fat_train.benchmark.race import Outcome
from fat_train.benchmark.table import as_csv, cost_lines, markdown, rows_of, terminal_table, verdict

RESULTS = {
    "crop": [Outcome("dali", [400.0, 600.0]), Outcome("timm", [200.0, 200.0]), Outcome("ffcv", why_not="not there")],
    "full": [
        Outcome("dali", [250.0, 250.0]),
        Outcome("timm", [100.0, 200.0]),
        Outcome("ffcv", why_not="not there"),
        Outcome("dali_uint8", [300.0, 300.0]),
        Outcome("timm_uint8", [100.0, 100.0]),
    ],
}


def test_rows_hold_median_spread_and_ratio_to_the_baseline_of_their_kind() -> None:
    rows = {row[:2]: row[2:] for row in rows_of(RESULTS)}
    assert rows["crop", "dali"] == ("500", "400 – 600", "2.50")
    assert rows["full", "dali_uint8"] == ("300", "300 – 300", "3.00")
    assert rows["crop", "ffcv"] == ("–", "not there", "–")


def test_without_timm_there_is_no_ratio_and_the_sentence_claims_none() -> None:
    alone = {"eval": [Outcome("torch", [50.0])]}
    assert rows_of(alone)[0][-1] == "–"
    assert verdict(alone, 2) == ("2 cores feed 50 img/s of the eval recipe (torch)", 50.0)
    assert verdict({"eval": [Outcome("timm", [50.0])]}, 2) is None


def test_the_cost_of_randaugment_is_time_of_a_core() -> None:
    dali, timm = cost_lines(RESULTS, workers=2)
    assert dali == "dali: 4.00 ms of a core an image, 100% on top of the crop"  # 2 (1/250 - 1/500)
    assert timm.startswith("timm: 3.33 ms")
    assert cost_lines({"full": RESULTS["full"]}, workers=2) == []


def test_a_cost_below_nothing_is_called_noise() -> None:
    (line,) = cost_lines({"crop": [Outcome("dali", [200.0])], "full": [Outcome("dali", [300.0])]}, workers=2)
    assert line.startswith("dali: not to be told")


def test_the_sentence_is_about_the_richest_recipe() -> None:
    assert verdict(RESULTS, 2) == ("2 cores feed 250 img/s of the full recipe (dali): 1.88 x timm", 250.0)


def test_all_three_forms_hold_every_contestant() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_table(RESULTS))
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    text = markdown(RESULTS, ["machine: two cores"])
    for name in ("dali", "timm", "ffcv", "dali_uint8", "not there"):
        assert name in printed
        assert name in text
    assert "- machine: two cores" in text
    lines = as_csv(RESULTS).splitlines()
    assert lines[:3] == ["recipe,contestant,round,images_per_s", "crop,dali,1,400.00", "crop,dali,2,600.00"]
    assert len(lines) == 1 + 4 + 8


@pytest.mark.parametrize("recipe", ["crop", "full"])
def test_every_recipe_is_a_block(recipe: str) -> None:
    assert f"| {recipe} | dali |" in markdown(RESULTS, [])
