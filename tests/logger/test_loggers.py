"""Runs are logged where they are asked to be, without a network and without a login."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WORDS = [
    "model=fat_nano",
    "data=synthetic",
    "data.image_px=32",
    "data.eval_resize_px=32",
    "data.num_images=32",
    "data.num_val_images=8",
    "data.num_classes=4",
    "augment=none",
    "trainer.global_batch=8",
    "trainer.log_every_n_steps=1",
    "schedule.epochs=2",
    "schedule.warmup_epochs=0",
]
Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_tensorboard_gets_losses_and_accuracies(tmp_path: Path, cli: Cli) -> None:
    done = cli(*WORDS, "logger=tensorboard", f"folder={tmp_path}", "name=logged")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(tmp_path / "logged" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 8
    assert [event.step for event in events.Scalars("val/top1")] == [3, 7]


def test_wandb_without_a_login_writes_an_offline_run_that_can_be_synced(
    tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = cli(*WORDS, "logger=wandb", f"folder={tmp_path}", "name=logged")
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "logged" / "wandb").glob("offline-run-*/run-*.wandb")
    assert file.stem == f"run-{(tmp_path / 'logged' / 'wandb_id.txt').read_text()}"

    content = file.read_bytes()
    for key in (b"train/loss", b"val/top1", b"val/top5", b"fat_train.model.fat.FATConfig"):
        assert key in content
