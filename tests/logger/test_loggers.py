"""Services get the rows of metrics.csv, each once, whatever becomes of the run or of them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fat_train.checkpoint.weights import read_checkpoint
from fat_train.logger.build import LoggerConfig
from fat_train.metric.record import is_epoch_row, read_rows

WORDS = ["trainer.log_every_n_steps=1", "schedule.epochs=2", "name=logged", "trainer.accelerator=cpu"]
LONG = [*WORDS, "schedule.epochs=4", "data.num_images=800"]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def without(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged, without W&B's own words (`_step`, `_runtime`, `_timestamp`)."""
    return [{name: value for name, value in line.items() if not name.startswith("_")} for line in history]


def newest(run: Path) -> Path:
    return max((run / "wandb").glob("offline-run-*/run-*.wandb"))


@contextlib.contextmanager
def started(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run as a process of its own, which ends with the block."""
    with (
        log.open("wb") as file,
        subprocess.Popen([sys.executable, "-m", "fat_train", *words], stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def wandb_cores(parent: int) -> list[int]:
    """W&B's own processes under a run."""
    found = []
    for file in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children = [int(child) for child in file.read_text().split()]
            found += [child for child in children if Path(f"/proc/{child}/comm").read_text() == "wandb-core\n"]
    return found


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Makes a folder a disk of its own, of 4 KiB."""
    mounted: list[Path] = []

    def mount(folder: Path) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small disk needs root")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, tiny: list[str], cli: Cli) -> tuple[Path, str, str]:
    """The folder of a run that both services followed and that was made longer, and what its second start printed."""
    folder = tmp_path_factory.mktemp("runs")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for epochs in (1, 2):
        words = [*tiny, *WORDS, f"schedule.epochs={epochs}", "callback.ema.decay=0.9"]
        done = cli(
            *words, "logger=wandb", "logger.tensorboard=true", f"folder={folder}", env={**outside, "HOME": str(folder)}
        )
        assert done.returncode == 0, done.stderr
    return folder / "logged", done.stdout, done.stderr


def test_wandb_without_a_login_gets_the_rows_of_metrics_csv_to_the_bit(
    resumed: tuple[Path, str, str], read_wandb: Any, points_of: Any
) -> None:
    run, said, complained = resumed
    file = newest(run)
    told = read_wandb(file)
    assert len(told.history) == 10
    assert without(told.history) == points_of(run), "`wandb sync` puts a later file in the place of an earlier one"
    assert [line["_step"] for line in told.history] == list(range(10))
    assert told.x_axes == {"step": "", "*": "step"}, "plots are over updates"
    assert told.config["model"]["_target_"] == "fat_train.model.fat.FATConfig"
    assert f"W&B            offline: nobody is logged in; send it later with: wandb sync {file.parent}\n" in said
    assert "wandb" not in complained


def test_a_run_keeps_its_id_in_its_folder_and_in_its_checkpoints(
    resumed: tuple[Path, str, str], read_wandb: Any
) -> None:
    run, *_ = resumed
    ids = {read_wandb(file).run_id for file in (run / "wandb").glob("offline-run-*/run-*.wandb")}
    kept = read_checkpoint(run / "checkpoints" / "last.ckpt")["fat_train"]["wandb_id"]
    assert ids == {kept} == {(run / "wandb_id.txt").read_text()}


def test_tensorboard_shows_the_rows_once_also_after_a_resume(resumed: tuple[Path, str, str]) -> None:
    run, *_ = resumed
    rows = read_rows(run / "metrics.csv")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for tag, column, of_epochs in (
        ("train/loss", "train/loss", False),
        ("train/loss_epoch", "train/loss", True),
        ("val/top1", "val/top1", True),
    ):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(int(row["step"]), float(row[column])) for row in rows if is_epoch_row(row) == of_epochs]
        assert [step for step, _ in shown] == [step for step, _ in expected]
        torch.testing.assert_close([value for _, value in shown], [value for _, value in expected])


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id_and_the_newest_file_has_every_row(
    tmp_path: Path, tiny: list[str], cli: Cli, read_wandb: Any, points_of: Any
) -> None:
    """SIGKILL of the run and of W&B's process, as when a job is cut off: its last rows may not be in the first file."""
    words = [*tiny, *LONG, "logger=wandb", f"folder={tmp_path}"]
    run, log = tmp_path / "logged", tmp_path / "log"
    with started(words, log) as process:
        wait_for((run / "checkpoints" / "last.ckpt").exists, process, log)
        wait_for(lambda: bool(wandb_cores(process.pid)), process, log)
        cores = wandb_cores(process.pid)
        process.kill()
        for core in cores:
            os.kill(core, signal.SIGKILL)
    first_id = (run / "wandb_id.txt").read_text()
    (run / "wandb_id.txt").unlink()  # the checkpoint knows it too
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    told = read_wandb(newest(run))
    assert told.run_id == first_id == (run / "wandb_id.txt").read_text()
    assert without(told.history) == points_of(run)
    steps = [line["step"] for line in told.history if "epoch" not in line]
    assert steps == list(range(1, 401)), "every update once"


@pytest.mark.slow
def test_the_death_of_wandbs_process_costs_no_row(
    tmp_path: Path, tiny: list[str], read_wandb: Any, points_of: Any
) -> None:
    run, log = tmp_path / "logged", tmp_path / "log"
    with started([*tiny, *LONG, "logger=wandb", f"folder={tmp_path}"], log) as process:
        wait_for(lambda: "W&B  " in log.read_text(), process, log)
        (core,) = wandb_cores(process.pid)
        os.kill(core, signal.SIGKILL)
        assert process.wait(timeout=200) == 0, log.read_text()
    said = log.read_text()
    assert said.count("W&B            failed (") == 1
    assert "the run goes on" in said
    assert "Traceback" not in said
    rows = points_of(run)
    assert len(rows) == 4 * 101
    assert without(read_wandb(newest(run)).history) == rows


@pytest.mark.slow
def test_a_full_disk_under_the_loggers_ends_no_run(
    tmp_path: Path, tiny: list[str], cli: Cli, full_disk: Callable[[Path], None]
) -> None:
    run = tmp_path / "logged"
    for name in ("wandb", "tensorboard"):
        full_disk(run / name)
    done = cli(*tiny, *WORDS, "logger=wandb", "logger.tensorboard=true", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    for name in ("W&B", "TensorBoard"):
        said = [line for line in done.stdout.splitlines() if line.startswith(f"{name:<15}")]
        assert "failed (OSError: No space left on device); the run goes on" in said[-2], said
        assert said[-1].endswith(f"not whole (OSError: No space left on device); {run / 'metrics.csv'} has every row")
    assert "Traceback" not in done.stderr
    assert len(read_rows(run / "metrics.csv")) == 10


@pytest.mark.slow
def test_a_server_that_refuses_leaves_an_offline_run_with_every_row(
    tmp_path: Path, tiny: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch, read_wandb: Any, points_of: Any
) -> None:
    for name, value in (("BASE_URL", "http://127.0.0.1:9"), ("API_KEY", "a" * 40), ("MODE", "online")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = cli(*tiny, *WORDS, "logger=wandb", "logger.wait_s=3", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "logged"
    assert "W&B            offline: no answer within 3 s (" in done.stdout
    assert f"send it later with: wandb sync {newest(run).parent}\n" in done.stdout
    assert without(read_wandb(newest(run)).history) == points_of(run)


@pytest.mark.slow
def test_a_wandb_process_that_hangs_is_left_alone_at_the_end(tmp_path: Path, tiny: list[str]) -> None:
    run, log = tmp_path / "logged", tmp_path / "log"
    with started([*tiny, *LONG, "logger=wandb", "logger.wait_s=1", f"folder={tmp_path}"], log) as process:
        wait_for(lambda: "W&B  " in log.read_text(), process, log)
        (core,) = wandb_cores(process.pid)
        os.kill(core, signal.SIGSTOP)
        assert process.wait(timeout=200) == 0, log.read_text()
    said = log.read_text()
    assert f"W&B            has not ended within 6 s; it is left alone, {run / 'metrics.csv'} is whole" in said
    assert "Traceback" not in said
    assert len(read_rows(run / "metrics.csv")) == 4 * 101
    with contextlib.suppress(ProcessLookupError):
        os.kill(core, 0)
        pytest.fail("the process that hung is still there")


def test_an_empty_file_of_the_id_is_no_id(tmp_path: Path) -> None:
    (tmp_path / "wandb_id.txt").write_text("")
    config = LoggerConfig(wandb=True)
    known = config.wandb_id(tmp_path, None)
    assert known
    assert config.wandb_id(tmp_path, None) == known
    assert LoggerConfig().wandb_id(tmp_path, None) == known, "a run that is resumed without W&B keeps its id"
