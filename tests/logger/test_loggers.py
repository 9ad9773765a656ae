"""Runs are logged where they are asked to be, without a network and without a login."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORDS = ["trainer.log_every_n_steps=1", "schedule.epochs=2", "name=logged"]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_tensorboard_gets_losses_and_accuracies(tmp_path: Path, tiny: list[str], cli: Cli) -> None:
    done = cli(*tiny, *WORDS, "logger=tensorboard", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "logged" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 8
    assert [event.step for event in events.Scalars("val/top1")] == [3, 7]


def test_wandb_without_a_login_writes_an_offline_run_that_can_be_synced(
    tmp_path: Path, tiny: list[str], cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = cli(*tiny, *WORDS, "logger=wandb", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "logged" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stem == f"run-{(tmp_path / 'logged' / 'wandb_id.txt').read_text()}"

    content = file.read_bytes()
    for key in (b"train/loss", b"val/top1", b"val/top5", b"fat_train.model.fat.FATConfig"):
        assert key in content
