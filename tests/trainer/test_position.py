"""A place in a run is two numbers; Lightning's counters follow from them for any split of the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning import Callback, Trainer

from fat_train.__main__ import main
from fat_train.callback import build
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.trainer.build import TrainerConfig
from fat_train.trainer.plan import plan_run
from fat_train.trainer.position import Position


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_resumed_from_every_single_update_sees_each_batch_once_and_counts_as_before(
    every: int, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each save, again and again: the log of (epoch, batch, update) is that of the unbroken run."""
    words = [*tiny, f"folder={tmp_path}", "schedule.epochs=2", "trainer.max_batch_per_device=4", "data.num_images=40"]
    words += ["trainer.val_every_n_epochs=2", f"callback.checkpoint.every_n_steps={every}"]

    class KilledError(Exception):
        pass

    class Recorder(Callback):
        def __init__(self, log: list[tuple[int, int, int]], kill_at: int) -> None:
            self.entries, self.kill_at = log, kill_at

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step >= self.kill_at:
                raise KilledError
            self.entries.append((trainer.current_epoch, batch_idx, trainer.global_step))

    def train(name: str, log: list[tuple[int, int, int]], kill_at: int) -> None:
        original = build.CallbackConfig.build
        with monkeypatch.context() as patch:
            recorder = Recorder(log, kill_at)
            patch.setattr(build.CallbackConfig, "build", lambda *a, **k: [recorder, *original(*a, **k)])
            main([*words, f"name={name}"])

    unbroken: list[tuple[int, int, int]] = []
    train("unbroken", unbroken, kill_at=1000)
    assert len(unbroken) == 2 * 5 * 2
    pieces: list[tuple[int, int, int]] = []
    for update in range(every, 10, every):
        with pytest.raises(KilledError):
            train("pieces", pieces, kill_at=update)
    train("pieces", pieces, kill_at=1000)
    assert pieces == unbroken
    ours, theirs = (
        read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["loops"]["fit_loop"]
        for name in ("pieces", "unbroken")
    )
    assert ours["epoch_progress"] == theirs["epoch_progress"]
    assert ours["epoch_loop.batch_progress"]["total"] == theirs["epoch_loop.batch_progress"]["total"]


def test_the_same_place_has_other_counts_of_micro_batches_on_other_devices() -> None:
    """Update 7 of 5 an epoch: two updates into the second epoch."""

    def batches(max_batch_per_device: int) -> dict[str, dict[str, int]]:
        trainer = TrainerConfig(global_batch=32, max_batch_per_device=max_batch_per_device)
        plan = plan_run(trainer, AdamWConfig(), CosineConfig(), train_images=160)
        progress: dict[str, dict[str, int]] = Position(updates=7, epoch_ended=False).loops(plan)[
            "epoch_loop.batch_progress"
        ]
        return progress

    assert (batches(32)["current"]["ready"], batches(32)["total"]["ready"]) == (2, 7)
    assert (batches(8)["current"]["ready"], batches(8)["total"]["ready"]) == (8, 28)
