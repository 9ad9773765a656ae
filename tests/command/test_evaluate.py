"""A checkpoint's numbers stay whichever way the model is computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.metric.record import read_rows
from fat_train.model.backbone import Backbone
from fat_train.op import choice
from fat_train.op.choice import REFERENCE, OpConfig, using


@pytest.fixture(autouse=True, scope="module")
def choice_kept() -> Iterator[None]:
    with using(OpConfig()):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    words = ["trainer.accelerator=cpu", "schedule.epochs=2", "optim.base_lr=1e-2", "optim.lr_per_images=8"]
    assert main([*tiny, *words, "op=reference", "name=reference", f"folder={folder}"]) == 0
    assert choice._config == REFERENCE
    return folder / "reference"


@pytest.mark.parametrize(
    "words", [[], ["op=reference"], ["reparameterize=true"], ["reparameterize=true", "batch_size=5"]]
)
def test_what_was_trained_by_the_definitions_gives_its_last_epochs_numbers(words, run, capsys, monkeypatch):
    folded: list[Backbone] = []
    reparameterize = Backbone.reparameterize
    monkeypatch.setattr(Backbone, "reparameterize", lambda self: folded.append(self) or reparameterize(self))
    capsys.readouterr()
    assert main(["evaluate", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", "trainer.accelerator=cpu", *words]) == 0
    last = read_rows(run / "metrics.csv")[-1]
    said = capsys.readouterr().out
    assert f"raw            top-1 {float(last['val/top1']):.3f} %" in said
    assert f"loss {float(last['val/loss']):.4f}   16 images" in said
    assert [model.reparameterized for model in folded] == [True] * ("reparameterize=true" in words)
    assert (choice._config == REFERENCE) == ("op=reference" in words)
