"""The same command finds its run again, and never destroys one without being told."""

from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.checkpoint.run_folder import RunFolder
from fat_train.types import UserError


@pytest.fixture
def used(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    folder.last.touch()
    folder.metrics.touch()
    folder.write_config({"optim": {"base_lr": 1.0, "eps": 1e-8}, "seed": 0})
    return folder


def test_a_new_run_starts_afresh(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.starting_point("auto", overwrite=False) is None
    assert folder.starting_point("never", overwrite=False) is None


def test_an_existing_run_is_gone_on_with(used: RunFolder) -> None:
    assert used.starting_point("auto", overwrite=False) == used.last


def test_a_run_whose_last_checkpoint_is_gone_is_not_deleted_by_resuming(used: RunFolder) -> None:
    used.last.rename(used.checkpoints / "best-001-50.00.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is not there, but best-001-50\.00\.ckpt is"):
        used.starting_point("auto", overwrite=False)
    assert used.starting_point("never", overwrite=True) is None


def test_halves_of_files_whose_writer_was_killed_are_swept_away(used: RunFolder) -> None:
    (used.checkpoints / ".last.ckpt.77.part").touch()
    used.sweep()
    assert [file.name for file in used.checkpoints.iterdir()] == ["last.ckpt"]


def test_starting_afresh_over_a_run_wants_to_be_told_twice(used: RunFolder) -> None:
    with pytest.raises(UserError, match="Add overwrite=true to delete it, or give another name="):
        used.starting_point("never", overwrite=False)
    assert used.last.exists()
    assert used.starting_point("never", overwrite=True) is None


def test_clearing_deletes_what_a_run_wrote_and_nothing_else(used: RunFolder) -> None:
    (used.root / "notes.txt").touch()
    used.clear()
    assert [file.name for file in used.root.rglob("*") if file.is_file()] == ["notes.txt"]


def test_a_changed_configuration_is_shown_key_by_key(used: RunFolder) -> None:
    assert used.config_diff({"optim": {"base_lr": 2.0, "clip": 5}, "seed": 0}) == [
        "optim.base_lr: 1.0 -> 2.0",
        "optim.clip: (not there) -> 5",
        "optim.eps: 1e-08 -> (not there)",
    ]
    assert used.config_diff({"optim": {"base_lr": 1.0, "eps": 1e-8}, "seed": 0}) == []
