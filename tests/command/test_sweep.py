"""-m trains every combination, goes on where it was, and one bad run does not stop the others."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.command.sweep import Relay, _ready
from fat_train.config.sweep import sweep_cells
from fat_train.metric.record import is_epoch_row, read_rows
from fat_train.report.manifest import read_manifest

Cli = Callable[..., subprocess.CompletedProcess[str]]
SWEEP = Path("runs/fat_nano_synthetic_sweep")
LEAVES_WHEN_ASKED = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
Path(sys.argv[1]).touch()
time.sleep(60)
"""


def epochs_of(run: Path) -> int:
    file = run / "metrics.csv"
    return sum(map(is_epoch_row, read_rows(file))) if file.exists() else 0


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, of which nothing is left at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fat_train", *words],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 250
    while not happened():
        assert process.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> list[str]:
    return ["-m", *tiny, "schedule.epochs=1", "seed=0,1"]


@pytest.fixture(scope="module")
def trained(
    words: list[str], tmp_path_factory: pytest.TempPathFactory, cli: Cli
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A sweep of two runs, of which the first meets a damaged checkpoint: where it ran, and what it said."""
    folder = tmp_path_factory.mktemp("here")
    damaged = folder / SWEEP / "seed=0" / "checkpoints" / "last.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"no checkpoint")
    return folder, cli(*words, cwd=folder)


@pytest.fixture
def half_done(
    trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The sweep's folder in the working directory; its second run is finished, its first has not begun."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / SWEEP / "seed=0")
    monkeypatch.chdir(tmp_path)
    return SWEEP


def no_process(*_: object, **__: object) -> None:
    pytest.fail("a process was started")


def test_a_run_that_fails_leaves_the_others_alone(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = trained
    assert done.returncode == 1, done.stderr
    assert "is damaged" in done.stderr or "last.ckpt" in done.stderr
    said = done.stdout
    assert "cell 1/2  seed=0\n" in said
    assert "cell 1/2  failed (status 2) after" in said
    assert "cell 2/2  finished after" in said
    assert "| seed=0 | failed (status 2) | – | – |" in said
    assert "| seed=1 | finished | 25.00 | 1/1 |" in said
    assert f"-m fat_train report sweep={SWEEP}" in said
    assert epochs_of(folder / SWEEP / "seed=1") == 1
    assert [cell.name for cell in read_manifest(folder / SWEEP).cells] == ["seed=0", "seed=1"]


def test_one_run_is_trained_in_this_process_and_a_finished_sweep_starts_none(
    half_done: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Relay, "run", no_process)
    assert main([*words, "--cell", "0"]) == 0
    assert capsys.readouterr().out.startswith("cell 1/2  seed=0\n")
    assert epochs_of(half_done / "seed=0") == 1
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "cell 1/2  seed=0 was finished before: best val/top1 25.00, epochs 1/1" in said
    assert "cell 2/2  seed=1 was finished before" in said


def test_a_sweep_grows_by_values_and_keeps_its_runs(half_done: Path, words: list[str]) -> None:
    kept = (half_done / "seed=1" / "metrics.csv").read_bytes()
    assert main([*words[:-1], "seed=3,1", "--cell", "0"]) == 0
    assert [cell.name for cell in read_manifest(half_done).cells] == ["seed=0", "seed=1", "seed=3"]
    assert epochs_of(half_done / "seed=3") == 1
    assert (half_done / "seed=1" / "metrics.csv").read_bytes() == kept


@pytest.mark.parametrize(
    ("more", "gone"),
    [
        (["schedule.epochs=2"], None),
        (["resume=never", "overwrite=true"], None),
        ([], "checkpoints/last.ckpt"),
        ([], "config.yaml"),
    ],
    ids=["more epochs", "start again", "no checkpoint", "no config"],
)
def test_only_a_run_with_nothing_to_do_is_passed_over(
    more: list[str], gone: str | None, half_done: Path, words: list[str]
) -> None:
    cells = sweep_cells(words[1:])
    assert [one.is_finished() for one in _ready(cells, half_done, None)] == [False, True]
    if gone:
        (half_done / "seed=1" / gone).unlink()
    assert not any(one.is_finished() for one in _ready(sweep_cells([*words[1:], *more]), half_done, None))


def test_other_words_for_all_runs_are_said(
    half_done: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "optim.eps=1e-7", "--cell", "0"]) == 0
    assert "changed        (nothing) -> optim.eps=1e-7" in capsys.readouterr().out


def test_a_debugging_sweep_lies_apart(half_done: Path, words: list[str]) -> None:
    assert main([*words, "debug.max_val_batches=1", "--cell", "1"]) == 0
    assert (half_done / "debug" / "seed=1" / "metrics.csv").is_file()
    assert (half_done / "debug" / "sweep.yaml").is_file()
    assert not (half_done / "seed=0").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "model.drop_pth_rate=0,0.1"], "unknown key model.drop_pth_rate; did you mean drop_path_rate"),
        (["-m", "model=fat_nano,fat_b9"], "model=fat_b9: no such choice"),
        (["-m", "seed=0,-1"], "seed=-1: seed must be in"),
        (["-m", "trainer.global_batch=8,64"], "global_batch=64: trainer.global_batch=64 is more than"),
        (["-m", "seed=0"], "no word has several"),
        (["-m", "seed=0,1", "--cell", "2"], "--cell 2 is not there: this sweep has 2 runs, 0 to 1"),
        (["-m", "seed=0,1", "--cell", "-1"], "--cell wants the number of a run"),
        (["-m", "seed=0,1", "--cell"], "--cell wants a number after it"),
        (["seed=0,1", "--cell", "0"], "--cell takes one run of a sweep"),
        (["seed=0,1"], "-m runs one training per value"),
        (["evaluate", "-m", "checkpoint=a,b"], "-m trains one run per value; evaluate has no use for it"),
        (["-m", "seed=0,1", "name=a/b"], "name must be a plain folder name"),
    ],
)
def test_a_wrong_sweep_is_told_before_any_run(
    words: list[str],
    said: str,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Relay, "run", no_process)
    swept = {word.partition("=")[0] for word in words}
    fixed = [word for word in tiny if word.partition("=")[0] not in swept]
    assert main(words if words[0] == "evaluate" else [*fixed, *words]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_taken(
    half_done: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words[:-1], "seed=0", "optim.eps=1e-7,1e-8", "--cell", "0"]) == 2
    assert f"{half_done} holds a sweep over seed; this one is over optim.eps" in capsys.readouterr().err
    assert main([*words, f"folder={half_done}", "name=seed=1", "--cell", "0"]) == 2
    assert f"{half_done / 'seed=1'} is the folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["seed=0,1"], "fat_b0_imagenet_sweep"),
        (["model=fat_b1", "seed=0,1", "schedule.epochs=3"], "fat_b1_imagenet_sweep"),
        (["model=fat_b1,fat_b2"], "imagenet_sweep"),
        (["model=fat_b1,fat_b2", "data=digits,synthetic"], "sweep"),
        (["experiment=digits", "seed=0,1"], "fat_nano_digits_sweep"),
        (["experiment=fat_b0_300e,fat_b1_300e"], "experiment_sweep"),
        (["experiment=digits", "seed=0,1", "name=mine"], "mine"),
    ],
)
def test_the_sweeps_name_follows_from_what_all_its_runs_share(
    words: list[str], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["-m", *words, f"folder={tmp_path}", "--cfg"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- # cell ") == shown.count(f"\nfolder: {tmp_path / name}\n") >= 2
    assert list(tmp_path.iterdir()) == []


def test_a_signal_is_handed_on_to_the_run_and_remembered(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    def ask() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    former = signal.getsignal(signal.SIGUSR1)
    with Relay() as relay:
        asking = threading.Thread(target=ask)
        asking.start()
        assert relay.run([sys.executable, "-c", LEAVES_WHEN_ASKED, str(ready)]) == 75
        asking.join()
    assert relay.received == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == former


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tiny: list[str], tmp_path: Path, cli: Cli) -> None:
    words = ["-m", *tiny, "schedule.epochs=30", "seed=0,1"]
    first, second = (tmp_path / SWEEP / f"seed={seed}" for seed in (0, 1))
    with started(words, tmp_path) as sweep:
        wait_for(lambda: epochs_of(second) >= 2 and (second / "checkpoints" / "last.ckpt").exists(), sweep)
        os.killpg(sweep.pid, signal.SIGKILL)
    assert epochs_of(second) < 30
    finished = (first / "metrics.csv").read_bytes()

    done = cli(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cell 1/2  seed=0 was finished before" in done.stdout
    assert f"resuming       from {SWEEP / 'seed=1' / 'checkpoints' / 'last.ckpt'}" in done.stdout
    assert "| seed=1 | finished |" in done.stdout
    assert [epochs_of(run) for run in (first, second)] == [30, 30]
    assert (first / "metrics.csv").read_bytes() == finished


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_leave_starts_no_other_run(tiny: list[str], tmp_path: Path) -> None:
    with started(["-m", *tiny, "schedule.epochs=300", "seed=0,1"], tmp_path) as sweep:
        wait_for(lambda: epochs_of(tmp_path / SWEEP / "seed=0") >= 1, sweep)
        sweep.send_signal(signal.SIGTERM)
        assert sweep.wait(timeout=250) == 75
        assert not is_alive(sweep.pid), "the run is left behind"
    assert epochs_of(tmp_path / SWEEP / "seed=0") < 300
    assert not (tmp_path / SWEEP / "seed=1").exists()


@pytest.mark.slow
def test_one_run_of_a_sweep_trains_on_several_processes(tiny: list[str], tmp_path: Path, cli: Cli) -> None:
    """The launcher starts the same words again for the second process."""
    devices = ["trainer.accelerator=cpu", "trainer.devices=2"]
    done = cli("-m", "--cell", "1", *tiny, *devices, "schedule.epochs=1", "seed=0,1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cell 2/2  seed=1") == 1
    assert epochs_of(tmp_path / SWEEP / "seed=1") == 1
    assert not (tmp_path / SWEEP / "seed=0").exists()
