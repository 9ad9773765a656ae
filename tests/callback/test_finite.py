"""A loss that is not a number stops the run, with what is needed to understand it, before the weights are spoilt."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fat_train.__main__ import main
from fat_train.callback.finite import gradient_norms
from fat_train.checkpoint.weights import read_state_dict


def test_an_exploding_run_stops_with_step_rate_norms_and_the_last_good_checkpoint(
    tmp_path: Path, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, f"folder={tmp_path}", "name=blown", "schedule.epochs=3"]
    assert main([*words, "optim.base_lr=1e-3", "optim.lr_per_images=8", "schedule.epochs=1"]) == 0
    good = read_state_dict(tmp_path / "blown" / "checkpoints" / "last.ckpt")
    capsys.readouterr()

    assert main([*words, "optim.base_lr=1e30", "optim.clip_grad_norm=0"]) == 2
    said = capsys.readouterr().err
    assert "the loss became nan at update" in said
    assert "learning rate" in said
    for group in ("patch_embed", "layers.0", "layers.3", "head"):
        assert group in said
    assert f"The last good checkpoint is {tmp_path / 'blown' / 'checkpoints' / 'last.ckpt'}" in said
    assert "Traceback" not in said
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


def test_gradient_norms_are_grouped_by_layer() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), "head": nn.Linear(2, 1)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert gradient_norms(model) == pytest.approx({"layers.0": 6**0.5, "layers.1": 6**0.5, "head": 3**0.5})
