"""At every moment a checkpoint's name holds a whole file: a full disk or a fault costs nothing."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fat_train.checkpoint.io import AtomicCheckpointIO, write_atomically
from fat_train.types import UserError


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3)}, path)
    assert torch.load(path, weights_only=True)["weights"].tolist() == [0, 1, 2]
    assert names(path.parent) == ["last.ckpt"]


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_and_says_so(tmp_path: Path) -> None:
    """A real refusal by the system: the process may write no file beyond 64 kB."""
    script = textwrap.dedent(f"""
        import resource, signal, torch
        from pathlib import Path
        from fat_train.checkpoint.io import AtomicCheckpointIO
        from fat_train.types import UserError
        io, path = AtomicCheckpointIO(), Path({str(tmp_path)!r}) / "last.ckpt"
        io.save_checkpoint({{"epoch": 1}}, path)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            io.save_checkpoint({{"epoch": 2, "weights": torch.zeros(10**6)}}, path)
        except UserError as error:
            print(error)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "could not save the checkpoint" in done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout
    assert "the previous last.ckpt is untouched" in done.stdout
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"epoch": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_a_fault_while_saving_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"epoch": lambda: None}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_one_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not save the checkpoint"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.yaml", "a: 1\n")
    write_atomically(tmp_path / "config.yaml", "b: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "b: 2\n"
