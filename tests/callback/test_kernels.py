"""A run finds out once what is fastest, keeps it, and goes on with the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer

from fat_train.__main__ import main
from fat_train.callback import kernels
from fat_train.callback.kernels import Kernels, load_stored
from fat_train.model.fat import FATConfig
from fat_train.op import choice, table
from fat_train.op.choice import OpConfig
from fat_train.op.table import Table

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    choice.prefer({})


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU is measured as a GPU is."""
    monkeypatch.setattr(kernels, "MEASURED_ON", ("cpu",))
    monkeypatch.setattr(kernels, "ROUNDS", 1)


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    few = ["trainer.accelerator=cpu", "data.num_images=16", "debug.max_val_batches=0"]
    return [*tiny, *few, "schedule.epochs=1", f"folder={tmp_path}/runs", "name=run"]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = FATConfig(name="tiny", widths=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
        self.model = config.build(num_classes=2)


def start(tmp_path: Path, name: str = "run", *, op: OpConfig | None = None, deterministic: bool = False) -> None:
    """What happens when a fit of the run `name` starts."""
    file = tmp_path / "runs" / name / "kernels.json"
    callback = Kernels(op or OpConfig(), file, image_px=32, batch_per_device=2, deterministic=deterministic)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    callback.on_fit_start(trainer, Model())


def used(tmp_path: Path, name: str = "run") -> Table:
    found = table.load(tmp_path / "runs" / name / "kernels.json")
    assert found is not None
    return found


def told() -> dict[choice.Key, str]:
    """What `auto` takes now."""
    return {
        choice.key_of(operation, dtype, tuple(sizes)): way
        for (operation, dtype, *sizes), way in choice._fastest.items()
    }


def edit_stored(way: str) -> None:
    """Let the stored table say something else than it did."""
    file = table.path_of(kernels.cache_folder(), CPU)
    values: dict[str, Any] = json.loads(file.read_text())
    for row in values["rows"]:
        if row["key"][0] == "pointwise":
            row["way"] = way
    file.write_text(json.dumps(values))


def test_on_a_cpu_nothing_is_measured(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert "kernels" not in capsys.readouterr().out
    assert not (tmp_path / "runs" / "run" / "kernels.json").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("measuring")
def test_a_run_measures_before_its_first_update_and_goes_on_with_the_same_whatever_was_measured_since(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.index("kernels        timing ") < said.index("epoch 1/1")
    assert f"details: {tmp_path / 'runs' / 'run' / 'kernels.json'}" in said
    before = used(tmp_path)
    assert told() == before.fastest()
    edit_stored("gemm")
    assert load_stored(CPU) != before
    assert main([*words, "schedule.epochs=2"]) == 0
    assert "timing" not in capsys.readouterr().out
    assert used(tmp_path) == before
    assert told() == before.fastest()


@pytest.mark.usefixtures("measuring")
def test_what_one_run_has_measured_serves_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    assert used(tmp_path) == load_stored(CPU)
    edit_stored("gemm")
    capsys.readouterr()
    start(tmp_path, "other")
    assert "timing" not in capsys.readouterr().out
    assert used(tmp_path, "other") == load_stored(CPU) != used(tmp_path)


@pytest.mark.usefixtures("measuring")
def test_a_deterministic_run_measures_nothing_and_stays_with_the_fixed_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path, deterministic=True)
    assert "timing" not in capsys.readouterr().out
    assert {row.way for row in used(tmp_path).rows.values()} == {"auto"}
    assert told() == {}
    start(tmp_path, "other")  # which measures
    start(tmp_path, deterministic=True)
    assert {row.way for row in used(tmp_path).rows.values()} == {"auto"}, "also when it goes on"
    start(tmp_path, "third", deterministic=True)
    assert used(tmp_path, "third") == load_stored(CPU), "what is known already may be used"


@pytest.mark.usefixtures("measuring")
def test_a_cache_that_cannot_be_written_and_a_damaged_table_do_not_stop_a_run(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.write_text("a file where the folder should be")
    start(tmp_path)
    assert "the next run measures again" in capsys.readouterr().out
    (tmp_path / "runs" / "run" / "kernels.json").write_text("{")
    start(tmp_path)
    assert used(tmp_path).rows


@pytest.mark.usefixtures("measuring")
def test_a_table_of_another_device_is_not_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    file = tmp_path / "runs" / "run" / "kernels.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "NVIDIA Abacus"}))
    start(tmp_path)
    assert f"{file} is of NVIDIA Abacus" in capsys.readouterr().out
    assert used(tmp_path) == load_stored(CPU)


@pytest.mark.usefixtures("measuring")
def test_without_any_auto_there_is_nothing_to_measure(tmp_path: Path) -> None:
    start(tmp_path, op=choice.REFERENCE)
    assert not (tmp_path / "runs" / "run" / "kernels.json").exists()


@pytest.mark.slow
def test_two_ranks_compute_by_the_table_of_the_first(tmp_path: Path, tiny: list[str]) -> None:
    script = Path(__file__).with_name("measuring_run.py")
    words = [*tiny, "trainer.accelerator=cpu", "trainer.devices=2", "schedule.epochs=1", f"folder={tmp_path}/runs"]
    environment = os.environ | {"FAT_TRAIN_CACHE": str(tmp_path / "cache"), "TOLD": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kernels        timing ") == 1
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) > 10
