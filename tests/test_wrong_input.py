"""Each thing that a user can get wrong is answered by one message, no stack trace, and a non-zero exit."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.data.digits import digits_root
from fat_train.types import UserError

Cli = Callable[..., subprocess.CompletedProcess[str]]
TINY = ["model=fat_nano", "data.image_px=64", "data.eval_resize_px=64", "trainer.global_batch=8", "augment=light"]


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed as the error of a command that must fail."""
    capsys.readouterr()
    assert main(words) == 2
    message = capsys.readouterr().err
    assert message.startswith("Error: ")
    assert "Traceback" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path, digits_cache: Path) -> Path:
    """A small image folder of real files that a test may damage."""
    for split, count in (("train", 8), ("val", 2)):
        for digit in ("0", "1", "2"):
            target = tmp_path / "set" / split / digit
            target.mkdir(parents=True)
            for file in sorted((digits_root() / split / digit).iterdir())[:count]:
                shutil.copy(file, target)
    return tmp_path / "set"


def test_the_readmes_first_command_without_imagenet_or_gpus_says_what_is_missing_and_how_to_give_it(cli: Cli) -> None:
    done = cli("model=fat_b1", "trainer.devices=8")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "data.root is not set" in done.stderr
    assert "data.root=<folder>" in done.stderr
    if torch.cuda.device_count() < 8:
        assert "trainer.devices=8 asks for more than there are" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_stack_trace_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAT_TRAIN_TRACEBACK", "1")
    with pytest.raises(UserError, match="modle"):  # which Python itself then prints with its stack
        main(["modle=fat_b1"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (["evaluate"], "checkpoint is missing: give it as checkpoint=<str>"),
        (["evaluate", "checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: no such file"),
        (["evaluate", "checkpoint=x.ckpt", "weigths=ema"], "unknown key weigths; did you mean weights?"),
        (["report", "run=nowhere"], "run=nowhere"),
        (["preview", "experiment=digits", "count=0"], "count must be at least 1"),
        (["data.root=/nowhere"], "data.root=/nowhere"),
        (["--config-dir", "nowhere"], "--config-dir nowhere is not a folder"),
        (["--config-dir"], "--config-dir wants a folder after it"),
        (["--hlep"], "unknown option --hlep; did you mean --help?"),
        (["model=null"], "model=null: no such choice"),
        (["experiment=digits", "optim.base_lr=inf"], "optim.base_lr must be finite"),
        (["experiment=digits", "seed=4294967296"], "seed must be in [0, 2**32)"),
        (["preview", "experiment=digits", "out=x.foo"], "out=x.foo must be a file that ends in .png"),
        (["data.root=/tmp/no such, folder=über~"], "data.root=/tmp/no such, folder=über~ is not there"),
        (
            ["data=synthetic", "data.num_val_images=1", "trainer.accelerator=cpu", "trainer.devices=2"],
            "fewer than the 2",
        ),
    ],
)
def test_a_wrong_word_is_one_message(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in said(words, capsys)


def test_a_set_without_a_split_names_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(folder / "val")
    message = said([*TINY, f"data.root={folder}"], capsys)
    assert "val" in message
    assert "data.root" in message


def test_a_class_in_one_split_alone_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "train" / "seven").mkdir()
    shutil.copy(next((folder / "train" / "0").iterdir()), folder / "train" / "seven")
    assert "seven" in said([*TINY, f"data.root={folder}"], capsys)


def test_an_empty_class_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        (folder / split / "nothing").mkdir()
    assert "nothing" in said([*TINY, f"data.root={folder}"], capsys)


def test_a_set_smaller_than_the_batch_is_refused_with_a_batch_that_fits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = said([*TINY, f"data.root={folder}", "trainer.global_batch=1024"], capsys)
    assert "trainer.global_batch=24 or less" in message


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_corrupt_jpeg_is_named_by_its_path(
    backend: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = sorted((folder / "train" / "1").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:500])
    words = [*TINY, f"data.root={folder}", f"folder={tmp_path}", f"data.backend={backend}", "schedule.epochs=1"]
    assert str(broken) in said([*words, "schedule.warmup_epochs=0"], capsys)


def test_a_checkpoint_of_another_model_or_set_is_refused_before_it_is_touched(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*TINY, f"folder={tmp_path}", "name=one", "schedule.epochs=1", "schedule.warmup_epochs=0"]
    assert main([*words, f"data.root={folder}"]) == 0
    kept = (tmp_path / "one" / "checkpoints" / "last.ckpt").read_bytes()
    assert "is a checkpoint of model=fat_nano, not of fat_b0" in said(
        [*words, f"data.root={folder}", "model=fat_b0"], capsys
    )
    assert "was trained on 3 classes" in said([*words, "data=digits"], capsys)
    assert "updates an epoch" in said([*words, f"data.root={folder}", "trainer.global_batch=4"], capsys)
    assert "Add overwrite=true" in said([*words, f"data.root={folder}", "resume=never"], capsys)
    assert "3 classes, the data set has 10" in said(
        ["evaluate", f"checkpoint={tmp_path / 'one' / 'checkpoints' / 'last.ckpt'}", "data=digits"], capsys
    )
    assert (tmp_path / "one" / "checkpoints" / "last.ckpt").read_bytes() == kept


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "junk.ckpt").write_bytes(b"not a checkpoint")
    assert "junk.ckpt" in said(["evaluate", f"checkpoint={tmp_path / 'junk.ckpt'}"], capsys)
