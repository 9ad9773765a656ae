"""What saving costs is measured in a real training, whose folder is gone afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.benchmark.checkpoint import Seconds, lines_of


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    return ["benchmark", "checkpoint", *tiny, "data.num_images=200", f"folder={tmp_path}/runs"]


def test_every_other_block_begins_with_a_save_and_all_of_them_are_timed(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "updates=6", "every=2", "callback.ema.decay=0.9"]) == 0
    said = capsys.readouterr().out
    assert "ms a save: " in said
    assert "for a checkpoint every 2 (median of 3 pairs" in said
    kept = json.loads((tmp_path / "runs" / "benchmark_checkpoint.json").read_text())
    seconds = kept["seconds"]
    assert {
        name: len(seconds[name]) for name in ("with_save", "without_save", "copy_weights", "copy_all")
    } == dict.fromkeys(("with_save", "without_save", "copy_weights", "copy_all"), 3)
    assert len(seconds["handing_over"]) == len(seconds["background"]) == 4, "three, and the one at the end"
    assert all(line in said for line in kept["lines"])
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["benchmark_checkpoint.json"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("updates=1", "updates at least twice as many; got 20 and 1"),
        ("updates=400", "this one has 25 updates: give fewer, or a smaller trainer.global_batch"),
        ("trainer.devices=2", "runs on one device: give trainer.devices=1"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    wrong: str, said: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "trainer.accelerator=cpu", wrong]) == 2
    assert said in capsys.readouterr().err


def test_the_cost_is_the_median_over_pairs_of_blocks_and_the_pause_has_both_its_parts() -> None:
    seconds = Seconds(
        handing_over=[0.001, 0.003, 0.002],
        waiting=[0.001],
        background=[0.5],
        with_save=[1.1, 4.0, 2.02],
        without_save=[1.0, 2.0, 2.0],
        copy_weights=[0.006],
        copy_all=[0.012],
    )
    assert seconds.pause == pytest.approx(0.003)
    assert seconds.cost == pytest.approx(0.1)
    pause, copying, background, cost = lines_of(seconds, every=10, size_mb=50)
    assert "3.0 ms a save: 2.0 to hand over, 1.0 of waiting" in pause
    assert "the pause is 0.50 and 0.25 of that" in copying
    assert "500 ms until 50.0 MB" in background
    assert "+10.0% of the time of 10 updates" in cost
