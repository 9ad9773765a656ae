"""The average is evaluated beside the raw weights, saved beside them, and never mixed up with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from fat_train.__main__ import main
from fat_train.callback.ema import update_unless
from fat_train.checkpoint.weights import read_state_dict
from fat_train.metric.record import read_rows

WORDS = ["optim.base_lr=1e-3", "optim.lr_per_images=8", "callback.ema.decay=0.5", "name=ema"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert main([*tiny, *WORDS, f"folder={folder}", "schedule.epochs=2"]) == 0
    return folder / "ema"


def test_both_kinds_of_weights_are_evaluated_each_epoch(run: Path) -> None:
    last = read_rows(run / "metrics.csv")[-1]
    assert float(last["val/top1"]) >= 0
    assert float(last["val/top1_ema"]) >= 0


def test_both_kinds_of_weights_are_kept_and_differ(run: Path) -> None:
    raw, ema = (read_state_dict(run / "checkpoints" / "last.ckpt", which) for which in ("raw", "ema"))
    assert raw.keys() == ema.keys()
    assert not torch.equal(raw["head.weight"], ema["head.weight"])


def test_the_average_follows_its_formula(tmp_path: Path, tiny: list[str]) -> None:
    """ema_k = 0.5 ema_(k-1) + 0.5 w_k: with one update an epoch, each epoch's checkpoint holds one step of it."""
    words = [
        *tiny,
        *WORDS,
        f"folder={tmp_path}",
        "data.num_images=8",
        "schedule.epochs=3",
        "callback.checkpoint.every_n_epochs=1",
    ]
    assert main(words) == 0
    files = [tmp_path / "ema" / "checkpoints" / f"epoch-{epoch:03d}.ckpt" for epoch in (1, 2, 3)]
    before = read_state_dict(files[0], "ema")["head.weight"]
    for file in files[1:]:
        after = 0.5 * before + 0.5 * read_state_dict(file, "raw")["head.weight"]
        torch.testing.assert_close(read_state_dict(file, "ema")["head.weight"], after)
        before = after


def test_a_resumed_average_goes_on_where_it_was(tmp_path: Path, tiny: list[str]) -> None:
    """Two epochs and then a third give what three epochs give; the schedule's length is fixed by three epochs here."""
    whole = [*tiny, *WORDS, f"folder={tmp_path}", "schedule.epochs=3", "callback.checkpoint.every_n_epochs=1"]
    assert main(whole) == 0
    unbroken = read_state_dict(tmp_path / "ema" / "checkpoints" / "last.ckpt", "ema")
    checkpoints = tmp_path / "ema" / "checkpoints"
    (checkpoints / "epoch-002.ckpt").replace(checkpoints / "last.ckpt")
    assert main(whole) == 0
    resumed = read_state_dict(checkpoints / "last.ckpt", "ema")
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_evaluating_both_gives_the_last_epochs_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", "weights=both", "batch_size=5"]) == 0
    printed = capsys.readouterr().out
    last = read_rows(run / "metrics.csv")[-1]
    assert f"raw            top-1 {float(last['val/top1']):.3f}" in printed
    assert f"ema            top-1 {float(last['val/top1_ema']):.3f}" in printed
    assert "16 images" in printed


def test_an_update_that_only_the_device_knows_to_be_left_out_leaves_the_average_to_the_bit() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plain, masked = ModelEmaV3(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    for update in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3, 8, 8))
        skipped = update % 3 == 1
        if not skipped:
            plain.update(model)
        update_unless(torch.tensor(float(skipped)), masked, model)
        for name, value in plain.module.state_dict().items():
            if value.is_floating_point():  # counts are copied; a guard has put the model's own back by then
                assert torch.equal(masked.module.state_dict()[name], value), (update, name)
