"""The last, the best few and every so many epochs are kept, and a resumed run goes on keeping them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.callback.checkpoint import CheckpointConfig
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import is_epoch_row, read_rows
from fat_train.types import UserError


def kept(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """Five epochs in two sittings: two, and then three more."""
    folder = tmp_path_factory.mktemp("runs")
    words = [
        *tiny,
        f"folder={folder}",
        "name=kept",
        "callback.checkpoint.top_k=2",
        "callback.checkpoint.every_n_epochs=2",
    ]
    for epochs in (2, 5):
        assert main([*words, f"schedule.epochs={epochs}", "optim.lr_per_images=8"]) == 0
    return folder / "kept"


def test_the_last_the_best_two_and_every_second_epoch_are_kept(run: Path) -> None:
    top1 = [(float(row["val/top1"]), i) for i, row in enumerate(read_rows(run / "metrics.csv")) if is_epoch_row(row)]
    best = sorted(top1, reverse=True)[:2]
    names = kept(run)
    assert [name for name in names if name.startswith("epoch")] == ["epoch-002.ckpt", "epoch-004.ckpt"]
    assert {"last.ckpt", "previous.ckpt"} <= set(names)
    saved = sorted(float(name.removesuffix(".ckpt").rpartition("-")[2]) for name in names if name.startswith("best"))
    assert saved == pytest.approx(sorted(value for value, _ in best), abs=0.01)
    assert len(names) == 6, names


def test_the_name_of_a_checkpoint_is_its_epoch_counted_from_one(run: Path) -> None:
    assert read_checkpoint(run / "checkpoints" / "epoch-002.ckpt")["epoch"] == 1


@pytest.mark.parametrize("name", ["top_k", "every_n_epochs"])
def test_negative_numbers_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=rf"callback\.checkpoint\.{name} must not be negative"):
        CheckpointConfig(**{name: -1})
