"""A checkpoint is what the training was when it was asked for, although the training goes on meanwhile."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from fat_train.checkpoint.writer import BackgroundCheckpointIO, WriteOrder, addresses


@pytest.fixture
def io() -> BackgroundCheckpointIO:
    return BackgroundCheckpointIO()


def read(path: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return content


def test_what_is_saved_is_read_back(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    io.save_checkpoint({"weights": torch.arange(3)}, tmp_path / "new folder" / "last.ckpt")
    io.teardown()
    assert read(tmp_path / "new folder" / "last.ckpt")["weights"].tolist() == [0, 1, 2]


def test_weights_may_change_once_the_copy_is_waited_for_and_statistics_at_once(
    io: BackgroundCheckpointIO, tmp_path: Path
) -> None:
    weights, statistics = torch.zeros(2**22), torch.zeros(8)
    for turn in range(5):
        order = WriteOrder(still=addresses([weights]))
        io.save_checkpoint({"weights": weights, "statistics": statistics}, tmp_path / "last.ckpt", order)
        statistics.add_(1)
        io.wait_for_copy()
        weights.add_(1)
        io.flush()
        saved = read(tmp_path / "last.ckpt")
        assert saved["weights"].unique().tolist() == [turn]
        assert saved["statistics"].unique().tolist() == [turn]
    io.teardown()


def test_one_file_gets_all_its_names_and_the_former_one_is_kept(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    last, previous, best, worse = (tmp_path / f"{name}.ckpt" for name in ("last", "previous", "best", "worse"))
    for number in (1, 2):
        order = WriteOrder(also_as=(best if number == 2 else worse,), keep_former_as=previous)
        io.save_checkpoint({"number": torch.tensor(number)}, last, order)
    io.save_checkpoint({"number": torch.tensor(3)}, last, WriteOrder(keep_former_as=previous, then_delete=(worse,)))
    io.teardown()
    assert {path.stem: int(read(path)["number"]) for path in tmp_path.iterdir()} == {
        "last": 3,
        "previous": 2,
        "best": 2,
    }


def test_a_failed_write_is_told_once_and_changes_nothing(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    io.save_checkpoint({"number": torch.tensor(1)}, folder / "last.ckpt")
    io.flush()
    shutil.move(folder, tmp_path / "moved")
    folder.touch()  # no folder can be made here now
    io.save_checkpoint({"number": torch.tensor(2)}, folder / "last.ckpt")
    io.flush()
    failure = io.take_failure()
    assert failure is not None
    assert failure[0] == folder / "last.ckpt"
    assert isinstance(failure[1], OSError)
    assert io.take_failure() is None
    assert int(read(tmp_path / "moved" / "last.ckpt")["number"]) == 1
    io.teardown()


def test_a_state_dict_keeps_what_it_says_about_itself(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    state = torch.nn.BatchNorm2d(2).state_dict()
    io.save_checkpoint({"state_dict": state}, tmp_path / "last.ckpt")
    io.teardown()
    assert read(tmp_path / "last.ckpt")["state_dict"]._metadata == state._metadata  # type: ignore[attr-defined]


def test_threads_that_begin_while_one_writes_compute_as_before(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    before, later = torch.get_num_threads(), []
    io.save_checkpoint({}, tmp_path / "last.ckpt")
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    io.teardown()
    assert later == [before] == [torch.get_num_threads()]
