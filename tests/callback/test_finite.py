"""An update that is not finite changes nothing; too many in a row stop the run, and the last of them is kept."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn

import broken_run
from broken_run import KINDS, break_updates, mend
from fat_train.__main__ import main
from fat_train.callback.build import CallbackConfig
from fat_train.callback.faulty_update import FaultyUpdate, gradient_norms
from fat_train.callback.finite import LINES, SkipNonFinite
from fat_train.checkpoint.weights import read_checkpoint, read_state_dict
from fat_train.metric.record import is_epoch_row, read_rows

ONE_UPDATE_AN_EPOCH = ["data.num_images=8", "callback.checkpoint.every_n_epochs=1"]
LEARNS = ["optim.base_lr=1e-3", "optim.lr_per_images=8", "callback.ema.decay=0.5", "model.drop_path_rate=0.1"]


@pytest.fixture(autouse=True)
def whole() -> Iterator[None]:
    yield
    mend()


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard learns of an update only when the next one is about to step."""
    begin = SkipNonFinite.on_train_start

    def on_train_start(self: SkipNonFinite, *arguments: Any) -> None:
        begin(self, *arguments)
        self._asynchronous = True

    monkeypatch.setattr(SkipNonFinite, "on_train_start", on_train_start)


def learnt(file: Path) -> dict[str, Any]:
    """What an update changes: weights with buffers, their average, the optimiser's moments and counts."""
    content = read_checkpoint(file)
    moments = content["optimizer_states"][0]["state"]
    return {"raw": content["state_dict"], "ema": content["ema"]["state_dict"], **moments}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for kind, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert torch.equal(ours[kind][name], tensor), (kind, name)


def test_an_exploding_run_stops_with_step_rate_norms_and_the_last_good_checkpoint(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, f"folder={tmp_path}", "name=blown", "schedule.epochs=3", "callback.guard.max_skipped=1"]
    assert main([*words, "optim.base_lr=1e-3", "optim.lr_per_images=8", "schedule.epochs=1"]) == 0
    good = read_state_dict(tmp_path / "blown" / "checkpoints" / "last.ckpt")
    capsys.readouterr()

    assert main([*words, "optim.base_lr=1e30", "optim.clip_grad_norm=0"]) == 2
    printed = capsys.readouterr()
    assert re.search(
        r"update 6 left out: loss nan, .* learning rate .* \(1 in a row, at most 1; 1 in all\)", printed.out
    )
    assert "the loss became nan at update 7" in printed.err
    assert "one more in a row than callback.guard.max_skipped=1" in printed.err
    assert "learning rate" in printed.err
    for group in ("patch_embed", "layers.0", "layers.3", "head"):
        assert group in printed.err
    assert f"The last good checkpoint is {tmp_path / 'blown' / 'checkpoints' / 'last.ckpt'}" in printed.err
    assert f"replay file={tmp_path / 'blown' / 'nonfinite_update_7_rank0.pt'}" in printed.err
    assert "Traceback" not in printed.err
    kept = read_state_dict(tmp_path / "blown" / "checkpoints" / "last.ckpt")
    assert all(torch.equal(good[name], kept[name]) for name in good)


def test_without_a_checkpoint_the_message_says_so(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tiny, f"folder={tmp_path}", "schedule.epochs=2", "optim.base_lr=1e30"]) == 2
    assert "No checkpoint was written yet" in capsys.readouterr().err


def test_an_epoch_whose_last_update_spoilt_the_weights_writes_no_checkpoint(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One update an epoch: its loss was fine, and the weights after it are not."""
    words = [*tiny, f"folder={tmp_path}", "name=late", "data.num_images=8", "optim.base_lr=1e30"]
    assert main([*words, "schedule.epochs=1", "optim.clip_grad_norm=0"]) == 2
    assert "no longer finite after update 1" in capsys.readouterr().err
    assert not list((tmp_path / "late" / "checkpoints").iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_an_update_that_is_left_out_leaves_weights_moments_statistics_and_average_as_they_were(
    tmp_path: Path, tiny: list[str], kind: str, accelerator: str
) -> None:
    if accelerator == "gpu" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    break_updates(kind, [1])
    words = [*tiny, *LEARNS, *ONE_UPDATE_AN_EPOCH, f"folder={tmp_path}", "name=hit", "schedule.epochs=3"]
    assert main([*words, f"trainer.accelerator={accelerator}"]) == 0
    first, second, third = (tmp_path / "hit" / "checkpoints" / f"epoch-00{epoch}.ckpt" for epoch in (1, 2, 3))
    assert_equal(learnt(second), learnt(first))
    assert read_checkpoint(second)["global_step"] == 2, "the run has gone on"
    assert not torch.equal(learnt(third)["raw"]["model.head.weight"], learnt(second)["raw"]["model.head.weight"])
    assert learnt(third)[0]["step"] == 2


def test_looking_late_and_looking_at_once_come_to_the_same(
    tmp_path: Path, tiny: list[str], request: pytest.FixtureRequest
) -> None:
    words = [*tiny, *LEARNS, f"folder={tmp_path}", "trainer.max_batch_per_device=4", "schedule.epochs=2"]
    break_updates("images", [1, 2, 7])
    assert main([*words, "name=once"]) == 0
    request.getfixturevalue("as_on_a_gpu")
    assert main([*words, "name=late"]) == 0
    once, late = (tmp_path / name / "checkpoints" / "last.ckpt" for name in ("once", "late"))
    assert_equal(learnt(late), learnt(once))
    counts = {"in_a_row": 1, "in_all": 3}
    assert [read_checkpoint(file)["callbacks"]["SkipNonFinite"] for file in (once, late)] == [counts, counts]
    assert learnt(late)[0]["step"] == 5


@pytest.mark.parametrize("late", [False, True], ids=["at once", "an update later"])
def test_the_run_stops_at_one_more_in_a_row_and_keeps_its_batch_and_the_weights_before_it(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str], late: bool, request: pytest.FixtureRequest
) -> None:
    if late:
        request.getfixturevalue("as_on_a_gpu")
    words = [*tiny, *LEARNS, f"folder={tmp_path}", "callback.guard.max_skipped=2", "schedule.epochs=2"]
    break_updates("loss", [0, 1, 3])
    assert main([*words, "name=enough", "schedule.epochs=1"]) == 0

    break_updates("loss", [4, 5, 6])
    capsys.readouterr()
    assert main([*words, "name=many"]) == 2
    printed = capsys.readouterr()
    assert "the loss became inf at update 7" in printed.err
    assert printed.out.count("left out: loss inf") == 2
    path = tmp_path / "many" / "nonfinite_update_7_rank0.pt"
    kept = FaultyUpdate.of(torch.load(path, weights_only=True), source="the test")
    before = read_state_dict(tmp_path / "many" / "checkpoints" / "last.ckpt")
    assert kept.state_dict.keys() == before.keys()
    assert all(torch.equal(kept.state_dict[name], before[name]) for name in before), "updates 5 to 7 changed nothing"
    assert kept.keys == [{"seed": 0, "update": 6, "micro_batch": 0, "rank": 0}]
    assert kept.losses == [float("inf")]
    assert kept.batch(0).images.dtype == torch.uint8
    assert kept.fat_train["config"]["optim"]["base_lr"] == 1e-3
    assert [file.name for file in (tmp_path / "many").glob("*.pt")] == [path.name]


def test_zero_stops_at_the_first(tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    break_updates("gradient", [2])
    words = [*tiny, f"folder={tmp_path}", "name=first", "schedule.epochs=1", "callback.guard.max_skipped=0"]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert re.search(r"the norm of the gradient became nan, with a loss of \d\.\d+, at update 3", printed.err)
    assert "left out" not in printed.out


def test_a_resumed_run_with_a_fault_behind_it_is_the_unbroken_one_to_the_bit(tmp_path: Path, tiny: list[str]) -> None:
    """The fault is the last update before the checkpoint and the first after it: counted as two in a row."""
    words = [*tiny, *LEARNS, f"folder={tmp_path}", "name=run", "schedule.epochs=3"]
    words += ["callback.checkpoint.every_n_epochs=1", "trainer.log_every_n_steps=1", "callback.guard.max_skipped=2"]
    break_updates("images", [7, 8])
    assert main(words) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    unbroken, rows = read_checkpoint(checkpoints / "last.ckpt"), read_rows(tmp_path / "run" / "metrics.csv")
    assert unbroken["callbacks"]["SkipNonFinite"] == {"in_a_row": 0, "in_all": 2}
    assert read_checkpoint(checkpoints / "epoch-002.ckpt")["callbacks"]["SkipNonFinite"]["in_a_row"] == 1
    whole = learnt(checkpoints / "last.ckpt")
    (checkpoints / "epoch-002.ckpt").replace(checkpoints / "last.ckpt")
    assert main(words) == 0
    assert_equal(learnt(checkpoints / "last.ckpt"), whole)
    assert read_checkpoint(checkpoints / "last.ckpt")["callbacks"]["SkipNonFinite"] == {"in_a_row": 0, "in_all": 2}
    timings = {"images_per_s": "", "epoch_s": ""}
    again = read_rows(tmp_path / "run" / "metrics.csv")
    assert [row | timings for row in again] == [row | timings for row in rows]


def test_an_epochs_loss_is_the_mean_of_the_updates_that_counted(tmp_path: Path, tiny: list[str]) -> None:
    break_updates("loss", [1])
    words = [*tiny, *LEARNS, f"folder={tmp_path}", "name=run", "schedule.epochs=1", "trainer.log_every_n_steps=1"]
    assert main(words) == 0
    *steps, epoch = read_rows(tmp_path / "run" / "metrics.csv")
    assert is_epoch_row(epoch)
    losses = [float(row["train/loss"]) for row in steps]
    assert losses[1] == float("inf")
    assert float(epoch["train/loss"]) == pytest.approx((losses[0] + losses[2] + losses[3]) / 3)


def test_a_run_tells_of_so_many_updates_and_counts_the_rest(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    break_updates("loss", range(0, 2 * LINES + 4, 2))
    words = [*tiny, f"folder={tmp_path}", "name=run", "schedule.epochs=3", "trainer.log_every_n_steps=100"]
    assert main([*words, f"data.num_images={8 * (LINES + 2)}", "debug.max_val_batches=1"]) == 0
    said = capsys.readouterr().out
    assert said.count("left out:") == LINES
    assert f"{LINES} in all; later ones are counted, not told" in said


class SpoilAndSave(Callback):
    """Saves in the middle of an epoch, after something has spoilt the weights."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            with torch.no_grad():
                pl_module.model.head.weight[0, 0] = float("nan")
            trainer.save_checkpoint(self.path)


def test_no_checkpoint_within_an_epoch_holds_weights_that_are_not_finite(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = CallbackConfig.build
    saver = SpoilAndSave(tmp_path / "spoilt.ckpt")
    monkeypatch.setattr(CallbackConfig, "build", lambda self, **given: [*build(self, **given), saver])
    assert main([*tiny, f"folder={tmp_path}", "schedule.epochs=1"]) == 2
    said = capsys.readouterr()
    assert f"could not save {saver.path}: its weights are no longer finite" in said.out
    assert "no longer finite after update 4" in said.err
    assert not saver.path.exists()


def broken(kind: str, updates: str, rank: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The same as a user's process, and as many more as the words ask for."""
    command = [sys.executable, broken_run.__file__, kind, updates, str(rank), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_two_processes_leave_out_what_one_of_them_cannot_use_and_stop_together(tmp_path: Path, tiny: list[str]) -> None:
    words = [*tiny, *LEARNS, *ONE_UPDATE_AN_EPOCH, f"folder={tmp_path}", "name=two", "callback.guard.max_skipped=1"]
    words += ["trainer.accelerator=cpu", "trainer.devices=2", "schedule.epochs=5"]
    done = broken("images", "1,3,4", 1, *words)
    assert done.returncode == 2, done.stderr
    checkpoints = tmp_path / "two" / "checkpoints"
    first, second, third, fourth = (checkpoints / f"epoch-00{epoch}.ckpt" for epoch in (1, 2, 3, 4))
    assert_equal(learnt(second), learnt(first))
    assert_equal(learnt(fourth), learnt(third))
    assert not torch.equal(learnt(third)["ema"]["head.weight"], learnt(second)["ema"]["head.weight"])
    assert done.stdout.count("update 2 left out") == 1
    assert "the loss became not finite on rank 1 at update 5" in done.stderr
    assert [file.name for file in (tmp_path / "two").glob("*.pt")] == ["nonfinite_update_5_rank1.pt"]
    assert "replay file=" in done.stderr
    assert "nonfinite_update_5_rank1.pt" in done.stderr


def test_gradient_norms_are_grouped_by_layer() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert gradient_norms(model) == pytest.approx({"layers.0": 6**0.5, "layers.1": 6**0.5, "head": 3**0.5})
