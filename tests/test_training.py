"""The main job from the outside: config in, trained and checkpointed model out, again and again the same."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import read_rows

GOLDEN = Path(__file__).parent / "golden" / "digits_loss.txt"
DIGITS = [
    "experiment=digits",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "trainer.log_every_n_steps=1",
    "model.drop_path_rate=0.1",
    "data.num_workers=1",
]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def losses(run: Path) -> list[str]:
    return [row["train/loss"] for row in read_rows(run / "metrics.csv")]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main([*DIGITS, f"folder={folder}"]) == 0
    return folder / "fat_nano_digits"


def test_the_same_command_gives_the_same_losses_to_the_bit(unbroken: Path, tmp_path: Path) -> None:
    assert main([*DIGITS, f"folder={tmp_path}"]) == 0
    assert losses(tmp_path / "fat_nano_digits") == losses(unbroken)


def test_losses_follow_the_golden_curve(unbroken: Path) -> None:
    """Another processor or another release of a kernel rounds otherwise, so across machines it is a band."""
    golden = [float(line) for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    assert [float(loss) for loss in losses(unbroken)] == pytest.approx(golden, rel=0.02)


@pytest.mark.slow  # tests/test_faults.py kills its runs at better moments, and compares more
def test_a_killed_run_resumes_to_the_unbroken_runs_weights_and_rows(unbroken: Path, tmp_path: Path, cli: Cli) -> None:
    """SIGKILL in the second epoch, then the same command: as if nothing had happened."""
    words = [*DIGITS, f"folder={tmp_path}"]
    run = tmp_path / "fat_nano_digits"
    started = subprocess.Popen(
        [sys.executable, "-m", "fat_train", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while not (run / "checkpoints" / "last.ckpt").exists() or len(read_rows(run / "metrics.csv")) < 26:
        assert started.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert read_checkpoint(run / "checkpoints" / "last.ckpt")["epoch"] == 0

    resumed = cli(*words)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming       from {run / 'checkpoints' / 'last.ckpt'}" in resumed.stdout
    for ours_row, theirs_row in zip(*(read_rows(folder / "metrics.csv") for folder in (run, unbroken)), strict=True):
        timings = {"images_per_s": "", "epoch_s": ""}
        assert ours_row | timings == theirs_row | timings
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (run, unbroken))
    assert all(torch.equal(ours["state_dict"][name], theirs["state_dict"][name]) for name in theirs["state_dict"])
    (our_moments,), (their_moments,) = ours["optimizer_states"], theirs["optimizer_states"]
    for number, moments in their_moments["state"].items():
        assert all(torch.equal(our_moments["state"][number][name], moments[name]) for name in moments)
    assert [file.name for file in sorted((run / "checkpoints").iterdir())] == [
        file.name for file in sorted((unbroken / "checkpoints").iterdir())
    ]


def test_a_finished_run_has_nothing_to_do_but_to_tidy_up(unbroken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = unbroken / "checkpoints" / "last.ckpt"
    kept = checkpoint.read_bytes()
    half = unbroken / ".curves.png.1.part"
    half.write_bytes(b"a report was killed")
    capsys.readouterr()
    assert main([*DIGITS, f"folder={unbroken.parent}"]) == 0
    assert "fat_nano_digits is finished" in capsys.readouterr().out
    assert not half.exists()
    assert checkpoint.read_bytes() == kept


def test_an_interrupted_run_says_how_it_goes_on(tmp_path: Path, digits_cache: Path) -> None:
    """Ctrl-C: one line, and the exit status that shells expect."""
    command = [sys.executable, "-m", "fat_train", *DIGITS, "schedule.epochs=200", f"folder={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as started:
        deadline = time.monotonic() + 200
        while not (tmp_path / "fat_nano_digits" / "checkpoints" / "last.ckpt").exists():
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        started.send_signal(signal.SIGINT)
        said, _ = started.communicate(timeout=100)
    assert started.returncode == 130
    assert "Ctrl-C: saving at the end of this update; once more ends at once" in said
    assert "leaving        Ctrl-C: at update" in said
    assert f"saved as {tmp_path / 'fat_nano_digits' / 'checkpoints' / 'last.ckpt'}; the same command goes on" in said
    assert "Traceback" not in said


def test_a_checkpoint_says_where_it_came_from(unbroken: Path) -> None:
    about = read_checkpoint(unbroken / "checkpoints" / "last.ckpt")["fat_train"]
    assert about["model"] == "fat_nano"
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["config"]["schedule"]["epochs"] == 2
    assert about["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert set(about["data"]) == {"train", "val"}


def test_a_longer_schedule_takes_effect_on_resume_and_is_shown(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*DIGITS, f"folder={tmp_path}", "debug.max_steps_per_epoch=3"]
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, "schedule.epochs=3", "optim.weight_decay=0.1"]) == 0
    said = capsys.readouterr().out
    assert "changed      schedule.epochs: 2 -> 3" in said
    assert "changed      optim.weight_decay: 0.05 -> 0.1" in said
    rows = read_rows(tmp_path / "debug" / "fat_nano_digits" / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9]
    rates = [float(row["lr"]) for row in rows]
    assert rates[8] > rates[6], "the longer cosine stands higher than the end of the shorter one"
    saved = read_checkpoint(tmp_path / "debug" / "fat_nano_digits" / "checkpoints" / "last.ckpt")
    assert {group["weight_decay"] for group in saved["optimizer_states"][0]["param_groups"]} == {0.0, 0.1}


def short_losses(folder: Path, *words: str) -> list[float]:
    few = ["debug.max_steps_per_epoch=5", "debug.max_val_batches=1", "schedule.epochs=2", "name=short"]
    assert main([*DIGITS, *few, *words, f"folder={folder}"]) == 0
    return [float(loss) for loss in losses(folder / "debug" / "short")]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> list[float]:
    return short_losses(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("option", ["trainer.precision=bf16-mixed", "trainer.grad_checkpointing=true"])
def test_other_ways_of_computing_stay_near_the_plain_losses(
    option: str, plain_losses: list[float], tmp_path: Path
) -> None:
    assert short_losses(tmp_path, option) == pytest.approx(plain_losses, rel=0.05)


@pytest.mark.slow
def test_a_compiled_model_stays_near_the_plain_losses(tmp_path: Path, digits_cache: Path, cli: Cli) -> None:
    words = [*DIGITS, "debug.max_steps_per_epoch=3", "debug.max_val_batches=1", f"folder={tmp_path}"]
    for name, extra in (("plain", []), ("compiled", ["trainer.compile=true"])):
        done = cli(*words, *extra, f"name={name}")
        assert done.returncode == 0, done.stderr
        assert ("compile        the first batch took" in done.stdout) == (name == "compiled")
    plain, compiled = (losses(tmp_path / "debug" / name) for name in ("plain", "compiled"))
    assert [float(loss) for loss in compiled] == pytest.approx([float(loss) for loss in plain], rel=0.05)


@pytest.mark.slow
def test_the_demo_reaches_98_percent(tmp_path: Path, digits_cache: Path) -> None:
    assert main(["experiment=digits", f"folder={tmp_path}"]) == 0
    rows = read_rows(tmp_path / "fat_nano_digits" / "metrics.csv")
    assert float(rows[-1]["val/top1"]) >= 98


def test_a_tiny_model_learns_32_images_by_heart(tmp_path: Path, digits_cache: Path) -> None:
    words = ["experiment=digits", "debug=overfit", f"folder={tmp_path}", "data.num_workers=1"]
    assert main(words) == 0
    last = read_rows(tmp_path / "debug" / "overfit" / "metrics.csv")[-1]
    assert float(last["val/top1"]) == 100
    assert last["val/count"] == "32"
