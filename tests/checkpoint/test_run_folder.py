"""The same command finds its run again, and never destroys one without being told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fat_train.checkpoint import run_folder
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.types import UserError


@pytest.fixture
def used(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    torch.save({"epoch": 1}, folder.last)
    folder.metrics.touch()
    folder.write_config({"optim": {"base_lr": 1.0, "eps": 1e-8}, "seed": 0})
    return folder


def test_a_new_run_starts_afresh(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert folder.starting_point("auto", overwrite=False) is None
    assert folder.starting_point("never", overwrite=False) is None


def test_an_existing_run_is_gone_on_with(used: RunFolder) -> None:
    assert used.starting_point("auto", overwrite=False) == (used.last, ())


def test_a_run_whose_last_checkpoint_is_gone_goes_on_from_the_newest_that_is_there(used: RunFolder) -> None:
    used.last.rename(used.checkpoints / "best-001-50.00.ckpt")
    start = used.starting_point("auto", overwrite=False)
    assert start == (used.checkpoints / "best-001-50.00.ckpt", (f"{used.last} is gone",))
    assert used.starting_point("never", overwrite=True) is None


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        at = content.index(bytes(range(200)))  # in the middle of the tensor
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize("how", ["cut short", "empty", "one bit flipped"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(used: RunFolder, how: str) -> None:
    torch.save({"weights": torch.arange(200, dtype=torch.uint8)}, used.last)
    used.last.replace(used.previous)
    torch.save({"weights": torch.arange(200, dtype=torch.uint8)}, used.last)
    damage(used.last, how)
    start = used.starting_point("auto", overwrite=False)
    assert start is not None
    assert start.path == used.previous
    assert start.notes[0].startswith(f"{used.last} is damaged: ")
    assert ("checksum" in start.notes[0]) == (how == "one bit flipped")
    used.begin_at(start)
    assert used.starting_point("auto", overwrite=False) == (used.last, ())


def test_a_run_of_which_every_checkpoint_is_damaged_is_not_started_afresh(used: RunFolder) -> None:
    used.last.write_bytes(b"half")
    used.previous.write_bytes(b"half")
    with pytest.raises(UserError, match=r"(?s)last\.ckpt is damaged.*previous\.ckpt is damaged.*overwrite=true"):
        used.starting_point("auto", overwrite=False)


def test_halves_of_files_whose_writer_was_killed_are_swept_away(used: RunFolder) -> None:
    (used.checkpoints / ".last.ckpt.77.part").touch()
    with used.held():
        assert [file.name for file in used.checkpoints.iterdir()] == ["last.ckpt"]


def test_two_processes_do_not_train_in_one_folder(used: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "HOLDER_LEAVES_WITHIN_S", 0.5)
    told = rf"another process trains in {used.root}: process {os.getpid()} on .*\. End it first"
    with used.held(), pytest.raises(UserError, match=told), used.held():
        pass
    with used.held():
        pass


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run cannot be written to: Not a directory\. Give folder="):
        RunFolder(tmp_path / "file" / "run").held().__enter__()


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
