"""A checkpoint is what the training was when it was asked for, although the training goes on meanwhile."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import torch

from fat_train.checkpoint.io import tensors_of
from fat_train.checkpoint.writer import BackgroundCheckpointIO, WriteOrder


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
    weights, moments, statistics, counts = torch.zeros(2**22), torch.zeros(2**22), torch.zeros(8), torch.zeros(8)
    checkpoint = {
        "state_dict": {"weights": weights, "statistics": statistics},
        "optimizer_states": [{"state": {0: {"exp_avg": moments}}}],
        "callbacks": {"counts": counts},
    }
    for turn in range(5):
        io.save_checkpoint(checkpoint, tmp_path / "last.ckpt", WriteOrder(buffers=frozenset(["statistics"])))
        statistics.add_(1)
        counts.add_(1)
        io.wait_for_copy()
        weights.add_(1)
        moments.add_(1)
        io.flush()
        saved = tensors_of(read(tmp_path / "last.ckpt"))
        assert {value for tensor in saved for value in tensor.unique().tolist()} == {turn}


def test_without_a_word_on_what_stays_everything_may_change_at_once(io: BackgroundCheckpointIO, tmp_path: Path) -> None:
    weights = torch.zeros(2**22)
    io.save_checkpoint({"state_dict": {"weights": weights}}, tmp_path / "last.ckpt")
    weights.add_(1)
    io.teardown()
    assert not read(tmp_path / "last.ckpt")["state_dict"]["weights"].any()  # type: ignore[index]


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
    assert failure[1] == "File exists"
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


def test_weights_that_are_not_finite_never_take_the_place_of_good_ones(
    io: BackgroundCheckpointIO, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    for value in (1.0, float("nan")):
        io.save_checkpoint({"state_dict": {"weights": torch.tensor([0.0, value])}}, path)
    io.teardown()
    assert io.take_failure() == (path, "its weights are no longer finite")
    assert read(path)["state_dict"]["weights"].tolist() == [0, 1]  # type: ignore[index]
