"""`check` finds before a run what would stop it, and times it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fat_train.__main__ import main

ON_TWO_CORES = """
import os, sys
from fat_train.__main__ import main
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
sys.exit(main())
"""
"""The command as a process that many cores do not bring to its end before it can be killed."""


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def words_for(root: Path, out: Path, *more: str) -> list[str]:
    return [
        "check",
        "model=fat_nano",
        f"data.root={root}",
        "seconds=0",
        "trainer.global_batch=2",
        f"folder={out}",
        *more,
    ]


@pytest.fixture
def data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes with four pictures each, in both splits, and a place of its own for what is kept."""
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    for number in range(16):
        folder = tmp_path / "data" / ("train", "val")[number % 2] / ("cat", "dog")[number // 2 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / f"{number}.JPEG")
    return tmp_path / "data"


def test_a_good_set_is_read_and_the_hours_are_estimated(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    assert main(["check", "experiment=digits", "seconds=2", f"out={out}", "data.num_workers=1"]) == 0
    printed = capsys.readouterr().out
    assert "fat_nano_digits: good" in printed
    assert "estimate" in printed
    found = json.loads(out.read_text())
    assert found["images_per_s"] > 1
    assert found["data"]["train"]["images"] == 1442
    assert found["plan"]["steps_per_epoch"] == 22
    assert not (tmp_path / "runs").exists()


def test_synthetic_images_need_no_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "model=fat_nano", "data=synthetic", "seconds=0", f"out={tmp_path / 'check.json'}"]
    assert main(words) == 0
    assert "data" not in json.loads((tmp_path / "check.json").read_text())


def test_images_that_stop_training_end_in_a_list_and_in_one_message(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (data_root / "train/cat/0.JPEG").read_bytes()
    (data_root / "train/cat/0.JPEG").write_bytes(whole[:-700])
    out = tmp_path / "runs"
    assert main(words_for(data_root, out)) == 2
    printed = capsys.readouterr()
    word = f"data.exclude={out}/exclude.txt"
    assert f"1 images, listed in {out}/exclude.txt: add {word} to the run" in printed.out
    assert printed.err.count("\n") == 1
    assert word in printed.err
    image, reason = (out / "exclude.txt").read_text().rstrip("\n").split("\t")
    assert image == "train/cat/0.JPEG"
    assert reason.startswith("# truncated: ")
    (finding,) = json.loads((out / "check.json").read_text())["data"]["train"]["findings"]
    assert finding["path"] == f"{data_root}/train/cat/0.JPEG"

    (data_root / "train/cat/0.JPEG").write_bytes(whole)
    assert main(words_for(data_root, tmp_path / "mended", "exclude_out=null")) == 0
    assert re.search(r"files +15 unchanged since the last check, 1 read", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "mended").iterdir()] == ["check.json"]


def test_a_list_that_could_not_be_written_is_refused_before_the_reading(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words_for(data_root, tmp_path / "runs", "exclude_out=list.json")) == 2
    assert "exclude_out=list.json must be a file that ends in .txt" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_killed_check_leaves_no_process_and_goes_on_where_it_was(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        large = tmp_path / f"{split}.JPEG"
        picture(len(split), (1000, 750)).save(large, progressive=True)
        for number in range(128):
            os.link(large, data_root / split / "cat" / f"large{number}.JPEG")
    words = words_for(data_root, tmp_path / "runs")
    check = subprocess.Popen([sys.executable, "-c", ON_TWO_CORES, *words], stdout=subprocess.DEVNULL)
    while not any(file.stat().st_size for file in tmp_path.glob("cache/check-v1/*.seen")):
        assert check.poll() is None
        time.sleep(0.01)
    check.send_signal(signal.SIGKILL)
    check.wait()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and _processes_with(f"FAT_TRAIN_CACHE={tmp_path / 'cache'}"):
        time.sleep(0.1)
    assert _processes_with(f"FAT_TRAIN_CACHE={tmp_path / 'cache'}") == []

    assert main(words) == 0
    counts = re.search(r"files +(\d+) unchanged since the last check, (\d+) read", capsys.readouterr().out)
    assert counts
    unchanged, read = map(int, counts.groups())
    assert unchanged + read == 272
    assert unchanged >= 64
    assert read >= 64


def _processes_with(variable: str) -> list[str]:
    """Processes that were started with an environment variable, as Linux lists them, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append((folder / "cmdline").read_text())
        except OSError:  # of someone else, or gone
            continue
    return found
