"""Every command does its work with a model that is not FAT."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broken_run import break_updates, mend
from fat_train.__main__ import main
from fat_train.benchmark.step import PARTS
from fat_train.metric.record import is_epoch_row, read_rows


@pytest.fixture
def words(tiny: list[str], second_family: list[str]) -> list[str]:
    return [*second_family, *(word for word in tiny if not word.startswith("model=")), "trainer.accelerator=cpu"]


@pytest.fixture
def whole_again() -> Iterator[None]:
    yield
    mend()


def test_it_is_trained_evaluated_folded_and_reported(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "plainnet_synthetic"
    assert main([*words, f"folder={tmp_path}", "schedule.epochs=1", "callback.ema.decay=0.9"]) == 0
    (last,) = filter(is_epoch_row, read_rows(run / "metrics.csv"))
    capsys.readouterr()
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    assert main(["evaluate", checkpoint, "trainer.accelerator=cpu", "reparameterize=true"]) == 0
    said = capsys.readouterr().out
    assert f"top-1 {float(last['val/top1']):.3f} %" in said
    assert main(["report", f"run={run}"]) == 0
    assert (run / "curves.png").is_file()


@pytest.mark.usefixtures("whole_again")
def test_a_faulty_update_is_kept_and_computed_again(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_updates("gradient", [2])
    assert main([*words, f"folder={tmp_path}", "name=run", "schedule.epochs=1", "callback.guard.max_skipped=0"]) == 2
    mend()
    capsys.readouterr()
    assert main(["replay", f"file={tmp_path / 'run' / 'nonfinite_update_3_rank0.pt'}"]) == 0
    said = capsys.readouterr().out
    assert "(plainnet, update 3, rank 0 of 1)" in said
    assert "the gradient at each output is finite" in said
    assert "stages.3" in said, "norms are of the family's own layers"


def test_check_times_it(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words, "seconds=0.1", f"out={tmp_path / 'check.json'}"]) == 0
    assert "plainnet_synthetic: good" in capsys.readouterr().out
    assert json.loads((tmp_path / "check.json").read_text())["images_per_s"] > 0


def test_benchmark_step_splits_its_updates(words: list[str], tmp_path: Path) -> None:
    more = ["data.num_images=200", "warmup=2", "updates=2", f"out={tmp_path / 'step.json'}"]
    assert main(["benchmark", "step", *words, *more]) == 0
    assert set(json.loads((tmp_path / "step.json").read_text())["parts"]) == set(PARTS) - {"ema"}


def test_benchmark_op_says_that_there_is_nothing_to_choose(
    second_family: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its plain convolutions are no operation that several kernels compute."""
    out = tmp_path / "op.json"
    assert main(["benchmark", "op", *second_family, "device=cpu", "batch_size=1", "image_px=32", f"out={out}"]) == 0
    assert "nothing measured" in capsys.readouterr().out
    assert [kept["rows"] for kept in json.loads(out.read_text())["models"].values()] == [[]]
