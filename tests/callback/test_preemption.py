"""Signals and clocks only say that it is time to leave; the run saves at an update's end and goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.callback.preemption import LeaveRequest, PreemptionConfig
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import read_rows
from fat_train.types import EXIT_UNFINISHED, UserError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with LeaveRequest(PreemptionConfig()) as request:
        assert request.why == ""
        os.kill(os.getpid(), number)
        assert request.why == f"received {number.name}"
        assert request.status == EXIT_UNFINISHED
        assert request.requeue() == "", "there is no job here"
    assert signal.getsignal(number) == former


def test_ctrl_c_is_noted_first_and_ends_at_once_the_second_time(capfd: pytest.CaptureFixture[str]) -> None:
    with LeaveRequest(PreemptionConfig()) as request:
        request.listen_while_training()
        os.kill(os.getpid(), signal.SIGINT)
        assert request.why == "Ctrl-C"
        assert request.status == 130
        assert "once more ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_it_is_time_to_leave_a_margin_before_the_limit() -> None:
    now = 1000.0
    with LeaveRequest(PreemptionConfig(max_hours=1, margin_s=60), clock=lambda: now) as request:
        now += 3539
        assert request.why == ""
        now += 1
        assert request.why == "callback.preemption.max_hours=1 are over"


def test_a_job_knows_its_time_limit_without_any_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 500)))
    with LeaveRequest(PreemptionConfig(margin_s=100), clock=lambda: now) as request:
        assert request.why == ""
        now += 401
        assert request.why == "the time limit of job 77 is near"


def test_a_job_shorter_than_the_margin_works_for_half_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would leave at once else, be requeued, and leave again, for ever."""
    now = float(int(time.time()))
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 60)))
    with LeaveRequest(PreemptionConfig(margin_s=120), clock=lambda: now) as request:
        now += 29
        assert request.why == ""
        now += 1
        assert request.why == "the time limit of job 77 is near"


@pytest.mark.parametrize("name", ["margin_s", "max_hours"])
def test_negative_numbers_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"callback\.preemption\.{name} must not be negative"):
        PreemptionConfig(**{name: -1})


def same(one: Path, other: Path) -> bool:
    ours, theirs = (read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (one, other))
    moments = zip(*(c["optimizer_states"][0]["state"].values() for c in (ours, theirs)), strict=True)
    return all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items()) and all(
        torch.equal(a[name], b[name]) for a, b in moments for name in b
    )


def rows(run: Path) -> list[dict[str, str]]:
    timings = {"images_per_s": "", "epoch_s": ""}
    return [row | timings for row in read_rows(run / "metrics.csv")]


def test_a_run_that_leaves_before_its_first_update_has_lost_nothing(tiny: list[str], tmp_path: Path) -> None:
    """`max_hours` of nothing: it leaves at once, however often it is started, and then runs through."""
    words = [*tiny, f"folder={tmp_path}", "schedule.epochs=2", "trainer.log_every_n_steps=1"]
    assert main([*words, "name=unbroken"]) == 0
    for _ in range(2):
        assert main([*words, "name=left", "callback.preemption.max_hours=1e-9"]) == EXIT_UNFINISHED
    assert main([*words, "name=left"]) == 0
    assert same(tmp_path / "left", tmp_path / "unbroken")
    assert rows(tmp_path / "left") == rows(tmp_path / "unbroken")


class _Leaver:
    """Sends this process a signal at the n-th call of a function."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, at: int, number: signal.Signals) -> None:
        original, calls = getattr(owner, name), [0]

        def counted(*args: object, **kwargs: object) -> object:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("module", "name", "at", "left_at"),
    [
        ("fat_train.task.classification.Classification", "train_step", 3, [2, False]),  # in the middle of update 2
        ("fat_train.task.classification.Classification", "train_step", 8, [4, False]),  # in an epoch's last update
        ("fat_train.task.classification.Classification", "eval_step", 1, [4, False]),  # in validation
        ("fat_train.trainer.module.ValidationModule", "on_validation_epoch_end", 1, [4, True]),  # at its end
    ],
)
def test_wherever_a_signal_comes_the_run_leaves_soon_and_goes_on_to_the_same_bits(
    module: str,
    name: str,
    at: int,
    left_at: list[int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four updates an epoch of two micro-batches each; what is left undone is done by the next start, and no more."""
    words = [*tiny, f"folder={tmp_path}", "schedule.epochs=2", "trainer.log_every_n_steps=1", "callback.ema.decay=0.5"]
    words += ["trainer.max_batch_per_device=4", "model.drop_path_rate=0.2", "augment=light"]
    assert main([*words, "name=unbroken"]) == 0
    package, _, owner = module.rpartition(".")
    with monkeypatch.context() as patch:
        _Leaver(patch, getattr(sys.modules[package], owner), name, at, signal.SIGUSR1)
        assert main([*words, "name=left"]) == EXIT_UNFINISHED
    assert read_checkpoint(tmp_path / "left" / "checkpoints" / "last.ckpt")["fat_train"]["position"] == left_at
    assert main([*words, "name=left"]) == 0
    assert same(tmp_path / "left", tmp_path / "unbroken")
    assert rows(tmp_path / "left") == rows(tmp_path / "unbroken")
    names = [sorted(file.name for file in (tmp_path / run / "checkpoints").iterdir()) for run in ("left", "unbroken")]
    assert names[0] == names[1]


@pytest.mark.slow  # that two ranks agree on a wish is test_rank_agreement.py's claim, that one leaves the one above
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_update(tiny: list[str], tmp_path: Path) -> None:
    """The second process gets SIGTERM; the first one saves, and the job's status says that it is not finished."""
    run = tmp_path / "pair"
    words = [*tiny, f"folder={tmp_path}", "name=pair", "schedule.epochs=10000", "trainer.log_every_n_steps=1"]
    words += ["trainer.devices=2", "trainer.accelerator=cpu"]
    command = [sys.executable, "-m", "fat_train", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as first:
        try:
            deadline = time.monotonic() + 200
            while not (run / "checkpoints" / "last.ckpt").exists():
                assert first.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            (second,) = subprocess.run(
                ["pgrep", "-P", str(first.pid), "-f", "fat_train"], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(int(second), signal.SIGTERM)
            said, _ = first.communicate(timeout=100)
        finally:
            first.kill()
    assert first.returncode == EXIT_UNFINISHED, said
    assert "leaving        another process was asked to leave: at update" in said
    assert "Traceback" not in said
    updates, _ = read_checkpoint(run / "checkpoints" / "last.ckpt")["fat_train"]["position"]
    assert [int(row["step"]) for row in read_rows(run / "metrics.csv")][-1] == updates
