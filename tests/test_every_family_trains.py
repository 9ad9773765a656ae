"""Every family of models along the whole road: trained, interrupted, resumed, evaluated, exported; and its recipe."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fat_train import list_models
from fat_train.config.zoo import facts_of
from fat_train.metric.record import read_rows

Cli = Callable[..., subprocess.CompletedProcess[str]]
NANOS = list_models("*_nano")


def smallest_sizes() -> list[str]:
    """Of each family the model that has fewest parameters, but for the one that is for tests."""
    families: dict[str, list[str]] = {}
    for name in list_models():
        if name not in NANOS:
            families.setdefault(facts_of(name).family, []).append(name)
    return [min(names, key=lambda name: facts_of(name).parameters) for names in families.values()]


@pytest.fixture
def photographs(tmp_path: Path, imagenet_samples: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "photographs").mkdir(exist_ok=True)
        (tmp_path / "photographs" / split).symlink_to(imagenet_samples)
    return tmp_path / "photographs"


@pytest.mark.slow
@pytest.mark.parametrize("name", NANOS)
def test_a_family_learns_digits_through_an_interruption_and_leaves_as_one_file(
    name: str, tmp_path: Path, digits_cache: Path, cli: Cli
) -> None:
    words = ["experiment=digits", f"model={name}", f"folder={tmp_path}", "trainer.accelerator=cpu"]
    run = tmp_path / f"{name}_digits"
    last = run / "checkpoints" / "last.ckpt"
    with subprocess.Popen([sys.executable, "-m", "fat_train", *words], stdout=subprocess.DEVNULL) as started:
        try:
            deadline = time.monotonic() + 300
            while not last.exists():
                assert started.poll() is None, "the run ended before it could be interrupted"
                assert time.monotonic() < deadline
                time.sleep(0.05)
            started.send_signal(signal.SIGTERM)
            assert started.wait(timeout=100) == 75
        finally:
            started.kill()

    command = [sys.executable, "-m", "fat_train", *words]
    resumed = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming       from {last}" in resumed.stdout
    row = read_rows(run / "metrics.csv")[-1]
    assert int(row["epoch"]) == 24
    assert float(row["val/top1"]) >= 95

    for folded in ("true", "false"):
        evaluated = cli("evaluate", f"checkpoint={last}", "trainer.accelerator=cpu", f"reparameterize={folded}")
        assert f"top-1 {float(row['val/top1']):.3f} %" in evaluated.stdout, evaluated.stderr
    exported = cli("export", f"checkpoint={last}", f"out={tmp_path / 'model.pt2'}")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "model.pt2").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", smallest_sizes())
def test_the_smallest_of_a_family_trains_on_photographs_by_its_own_recipe(
    name: str, tmp_path: Path, photographs: Path, cli: Cli
) -> None:
    words = ["trainer.accelerator=cpu", "trainer.global_batch=8", "debug.max_steps_per_epoch=2", "schedule.epochs=1"]
    done = cli(
        f"experiment={name}_300e",
        f"data.root={photographs}",
        f"folder={tmp_path}",
        "schedule.warmup_epochs=0",
        "debug.max_val_batches=1",
        "trainer.log_every_n_steps=1",
        *words,
    )
    assert done.returncode == 0, done.stderr
    rows = read_rows(next((tmp_path / "debug").glob("*/metrics.csv")))
    trained = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(trained) >= 2
    assert all(0 < loss < 20 for loss in trained)
