"""`benchmark step` splits the updates of a real training, and leaves nothing behind but its numbers."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.benchmark.step import PARTS


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    return ["benchmark", "step", *tiny, f"folder={tmp_path}/runs", "warmup=2", "updates=4"]


def test_the_parts_of_a_real_training_are_all_there_and_make_up_its_updates(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "data.num_images=200", "callback.ema.decay=0.9", "trace=true"]) == 0
    said = capsys.readouterr().out
    assert "bounds this run: " in said
    assert "300 epochs of ImageNet-1K take" in said
    runs = tmp_path / "runs"
    names = {"json", "csv", "md", "png", "trace.json.gz"}
    assert {file.name for file in runs.iterdir()} == {f"benchmark_step.{name}" for name in names}
    kept = json.loads((runs / "benchmark_step.json").read_text())
    assert set(kept["parts"]) == set(PARTS)
    assert [row["update"] for row in kept["updates"]] == [3, 4, 5, 6]
    for row in kept["updates"]:
        assert all(row["host_s"][part] > 0 for part in PARTS)
    assert sum(part["host"]["share"] for part in kept["parts"].values()) == pytest.approx(1)
    mean_s = sum(sum(row["host_s"].values()) for row in kept["updates"]) / 4
    assert kept["images_per_s"] == pytest.approx(8 / mean_s)
    assert kept["images_per_s_with_a_free_loader"] > kept["images_per_s"]
    assert kept["images_per_s_of_the_loader_alone"] > 0
    assert kept["peak_memory_bytes"] > 2**20
    assert {place.partition(":")[0] for place in kept["waits_in_step"]} <= {"callback/finite.py", "callback/ema.py"}
    assert all(line in said for line in kept["lines"])
    with gzip.open(runs / "benchmark_step.trace.json.gz") as file:
        events = [event["name"] for event in json.load(file)["traceEvents"]]
    assert events.count("forward") == 3


def test_epochs_may_be_short_and_their_turns_do_not_count(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "trainer.max_batch_per_device=4", f"out={tmp_path}/short.json"]) == 0
    kept = json.loads((tmp_path / "short.json").read_text())
    assert kept["plan"]["accumulate"] == 2
    assert [row["update"] for row in kept["updates"]] == [3, 6, 7, 10]
    assert [row["update"] for row in kept["turns"]] == [4, 5, 8, 9]
    assert "ema" not in kept["parts"]


@pytest.mark.slow  # two processes
def test_two_processes_train_and_the_first_reports(
    words: list[str], tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    more = ["data.num_images=200", "trainer.devices=2", "trainer.accelerator=cpu"]
    done = cli(*words, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bounds this run: ") == 1
    kept = json.loads((tmp_path / "runs" / "benchmark_step.json").read_text())
    assert kept["plan"]["world_size"] == 2
    assert {file.suffix for file in (tmp_path / "runs").iterdir()} == {".json", ".csv", ".md", ".png"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_on_a_gpu_the_host_waits_for_nothing_within_a_step(precision: str, words: list[str], tmp_path: Path) -> None:
    more = ["augment=deit", "callback.ema.decay=0.9", "data.num_images=400", "updates=30", "trainer.accelerator=gpu"]
    assert main([*words, *more, f"trainer.precision={precision}"]) == 0
    kept = json.loads((tmp_path / "runs" / "benchmark_step.json").read_text())
    assert kept["waits_in_step"] == {}
    for row in kept["updates"]:
        assert all(seconds >= -1e-4 for seconds in row["device_s"].values())
        assert row["device_s"]["backward"] > 0
        assert set(row["device_s"]) == set(PARTS) - {"rest"}
    host, device = (sum(sum(row[f"{side}_s"].values()) for row in kept["updates"]) for side in ("host", "device"))
    assert device == pytest.approx(host, rel=0.5), "both sides are of the same updates"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("updates=0", "updates must be at least 1; got 0"),
        ("warmup=0", "warmup must be at least 1; got 0"),
        ("update=5", "unknown key update"),
        ("updates=many", "updates must be int; got 'many'"),
        ("out=step.txt", "out=step.txt must be a file that ends in .json"),
        ("debug=profile", "give trace=true"),
        ("data.num_images=16", "an epoch of 2 updates has none between its first and its last"),
        ("trainer.devices=1000", "trainer.devices=1000 asks for more than there are"),
    ],
)
def test_a_wrong_word_is_one_message(
    wrong: str, said: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "trainer.accelerator=cpu", wrong]) == 2
    assert said in capsys.readouterr().err
