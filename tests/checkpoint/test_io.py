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

from fat_train.checkpoint.io import find_damage, link_or_copy, replacing, write_atomically, write_checkpoint


def names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def test_a_refusal_by_the_system_keeps_the_former_file_and_gives_the_systems_reason(tmp_path: Path) -> None:
    """The process may write no file beyond 64 kB."""
    script = textwrap.dedent(f"""
        import resource, signal, torch
        from pathlib import Path
        from fat_train.checkpoint.io import replacing, write_checkpoint
        path = Path({str(tmp_path)!r}) / "last.ckpt"
        with replacing(path) as beside:
            write_checkpoint({{"epoch": 1}}, beside)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            with replacing(path) as beside:
                write_checkpoint({{"epoch": 2, "weights": torch.zeros(10**6)}}, beside)
        except OSError as error:
            print(error.errno)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG}\n"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"epoch": 1}
    assert names(tmp_path) == ["last.ckpt"]


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path: Path) -> None:
    """A tensor of 2 PB that takes no memory: no disk has the room, and none of it is written."""
    vast = torch.empty(1, dtype=torch.uint8).expand(2 * 10**15)
    with pytest.raises(OSError, match=r"No space left on device \(2,000,000,001 MB needed, .* MB free\)"):
        write_checkpoint({"weights": vast}, tmp_path / "last.ckpt")
    assert names(tmp_path) == []


def test_a_fault_while_saving_leaves_no_half_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"epoch": 1}, path)
    with pytest.raises(Exception, match="pickle"), replacing(path) as beside:
        write_checkpoint({"epoch": lambda: None}, beside)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert names(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_file_is_found_wherever_it_is_cut(tmp_path: Path, share: float) -> None:
    path = tmp_path / "last.ckpt"
    write_checkpoint({"weights": torch.arange(10_000.0)}, path)
    assert find_damage(path) == ""
    os.truncate(path, int(path.stat().st_size * share))
    assert find_damage(path)


def test_any_flipped_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    tensor = torch.arange(1000, dtype=torch.int64) * 2**40
    write_checkpoint({"weights": tensor}, path)
    whole = path.read_bytes()
    start = whole.index(tensor.numpy().tobytes())
    for at in range(start, start + tensor.nbytes, 997):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        assert "checksum" in find_damage(path)


def test_a_second_name_holds_what_the_first_held(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_text("old")
    link_or_copy(tmp_path / "last.ckpt", tmp_path / "previous.ckpt")
    write_atomically(tmp_path / "last.ckpt", "new")
    assert (tmp_path / "previous.ckpt").read_text() == "old"


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "config.yaml", "a: 1\n")
    write_atomically(tmp_path / "config.yaml", "b: 2\n")
    assert (tmp_path / "config.yaml").read_text() == "b: 2\n"
