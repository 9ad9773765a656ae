"""A run on a part of the images, validated on a part of train/: what it says, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.data.datamodule import DigitsDataConfig, open_data

PART = ["data.subset=0.1", "data.holdout=0.1"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> list[str]:
    """A run of one epoch that is finished."""
    words = ["experiment=digits", "schedule.epochs=1", "schedule.warmup_epochs=0", "data.num_workers=1"]
    words += ["trainer.global_batch=32", f"folder={tmp_path_factory.mktemp('runs')}"]
    assert main([*words, *PART]) == 0
    return words


@pytest.fixture
def checkpoint(words: list[str]) -> Path:
    return Path(words[-1].removeprefix("folder=")) / "fat_nano_digits" / "checkpoints" / "last.ckpt"


def test_a_checkpoint_bears_the_lists_that_it_was_trained_and_validated_on(checkpoint: Path) -> None:
    about = read_checkpoint(checkpoint)["fat_train"]
    source = open_data(DigitsDataConfig(subset="0.1", holdout=0.1))
    assert about["data"] == {"train": source.train.fingerprint, "val": source.val.fingerprint}
    assert about["config"]["data"]["subset"] == 0.1


def test_evaluating_says_that_it_is_on_the_held_out_images_and_how_to_take_the_others(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"checkpoint={checkpoint}"]) == 0
    said = capsys.readouterr().out
    assert "digits (0.1 of train/ held out): 13 images" in said
    assert "data.holdout=0 evaluates on val/" in said
    assert "warning" not in said

    assert main(["evaluate", f"checkpoint={checkpoint}", "data.holdout=0"]) == 0
    said = capsys.readouterr().out
    assert "digits: 355 images" in said
    assert "held" not in said

    assert main(["evaluate", f"checkpoint={checkpoint}", "data.holdout=0.3"]) == 0
    assert "warning        these are not the images that were held out in training" in capsys.readouterr().out


def test_resuming_with_another_holdout_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """As many updates an epoch, so that nothing else stops it."""
    assert main([*words, "data.subset=0.1", "data.holdout=0.08", "schedule.epochs=2"]) == 2
    said = capsys.readouterr().err
    assert "has trained on images that data.holdout would now hold out" in said
    assert "resume=never overwrite=true" in said


def test_resuming_with_many_more_images_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "schedule.epochs=2"]) == 2
    said = capsys.readouterr().err
    assert "was trained with 4 updates an epoch and trainer.global_batch=" in said
    assert "this configuration has 45 (1442 images" in said


def test_resuming_with_other_lists_of_the_same_length_is_told(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left_out = open_data(DigitsDataConfig(subset="0.1", holdout=0.1)).train.paths[0]
    (tmp_path / "bad.txt").write_text(f"train/{left_out}\t# blurred\n")
    assert main([*words, "data.subset=0.1", f"data.exclude={tmp_path / 'bad.txt'}"]) == 0
    said = capsys.readouterr().out
    assert f"warning        the training images are not those of {checkpoint}" in said
    assert f"warning        the validation images are not those of {checkpoint}" in said
