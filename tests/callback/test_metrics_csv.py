from __future__ import annotations

import csv
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fat_train.callback.metrics_csv import CsvFile, MetricsCsv

CONTRACT = (
    "epoch,step,lr,train/loss,val/loss,val/top1,val/top5,val/top1_ema,val/top5_ema,val/count,images_per_s,epoch_s"
)
TIMES = ("images_per_s", "epoch_s")

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    return list(csv.DictReader(path.read_text().splitlines()))


def without_times(rows: Rows) -> Rows:
    return [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows]


@pytest.fixture
def metrics_csv(tmp_path: Path, tiny_run: Any) -> Callable[..., MetricsCsv]:
    def make(name: str = "metrics.csv", every: int = 2) -> MetricsCsv:
        return MetricsCsv(tmp_path / name, images_per_update=tiny_run.images_per_update, log_every_n_steps=every)

    return make


def test_the_header_is_the_contract(tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path) -> None:
    tiny_run.fit(metrics_csv(), epochs=1)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == CONTRACT


def test_rows_come_every_n_updates_and_at_each_epochs_end(
    tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    tiny_run.fit(metrics_csv(every=3), epochs=2)
    rows = read(tmp_path / "metrics.csv")
    assert [(row["epoch"], row["step"], row["epoch_s"] != "") for row in rows] == [
        ("0", "3", False),
        ("0", "4", True),
        ("1", "6", False),
        ("1", "8", True),
    ]
    for row in rows:
        assert float(row["images_per_s"]) > 0
        assert (row["val/top1"] == "") == (row["epoch_s"] == "")


def test_losses_are_means_over_the_micro_batches(
    tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    module = tiny_run.fit(metrics_csv(every=1), epochs=2)
    updates = np.array(module.losses).reshape(-1, tiny_run.accumulate).mean(1)
    rows = read(tmp_path / "metrics.csv")
    single = [float(row["train/loss"]) for row in rows if not row["epoch_s"]]
    np.testing.assert_allclose(single, updates, rtol=1e-6)
    of_epochs = [float(row["train/loss"]) for row in rows if row["epoch_s"]]
    np.testing.assert_allclose(of_epochs, updates.reshape(2, -1).mean(1), rtol=1e-7)


def test_the_rate_is_the_one_that_the_update_used(
    tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    tiny_run.fit(metrics_csv(every=1), epochs=2)
    for row in read(tmp_path / "metrics.csv"):
        # the schedule gives update number k the rate 0.1 / k
        assert float(row["lr"]) == pytest.approx(0.1 / int(row["step"]), rel=1e-12)


def test_validation_results_stand_in_their_epochs_row_alone(
    tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    tiny_run.fit(metrics_csv(every=100), epochs=3, check_val_every_n_epoch=2)
    first, second, third = read(tmp_path / "metrics.csv")
    assert (second["val/top1"], second["val/top5"], second["val/count"]) == ("80.0", "81.0", "8")
    assert second["val/top1_ema"] == ""
    assert first["val/top1"] == first["val/count"] == third["val/top1"] == third["val/count"] == ""


@pytest.mark.parametrize(
    ("saved_after", "hook"),
    [
        (4, "on_train_epoch_end"),
        (4, "on_validation_end"),
        (4, "on_train_batch_end"),
        (5, "on_train_batch_end"),
        (6, "on_train_batch_end"),
    ],
)
def test_a_resumed_run_writes_the_same_rows_as_an_unbroken_one(
    saved_after: int, hook: str, tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    tiny_run.fit(metrics_csv("unbroken.csv"))
    checkpoint = tmp_path / "saved.ckpt"
    tiny_run.fit(metrics_csv("broken.csv"), tiny_run.save_at(checkpoint, saved_after, hook), tiny_run.kill_at(11))
    assert [row["step"] for row in read(tmp_path / "broken.csv")][-1] == "10"
    tiny_run.fit(metrics_csv("broken.csv"), resume=checkpoint)
    unbroken, broken = without_times(read(tmp_path / "unbroken.csv")), without_times(read(tmp_path / "broken.csv"))
    assert broken == unbroken


def test_starting_afresh_drops_what_an_earlier_run_wrote(
    tiny_run: Any, metrics_csv: Callable[..., MetricsCsv], tmp_path: Path
) -> None:
    tiny_run.fit(metrics_csv(), epochs=3)
    tiny_run.fit(metrics_csv(), epochs=1)
    assert [row["step"] for row in read(tmp_path / "metrics.csv")] == ["2", "4", "4"]


def test_a_line_cut_short_by_a_kill_is_dropped_on_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    file = CsvFile(path)
    file.begin(0)
    file.append({"step": "5", "lr": "0.1"})
    with path.open("a") as text:
        text.write("0,6,0.0")
    assert [row["step"] for row in CsvFile(path).begin(100)] == ["5"]
    assert path.read_text().endswith(",,,\n")


def test_a_full_disk_is_said_once_and_its_rows_come_later(tmp_path: Path) -> None:
    file = CsvFile(tmp_path / "metrics.csv")
    file.begin(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = file.path.stat().st_size + 5  # the row is torn after five characters
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        with pytest.warns(UserWarning, match=r"metrics\.csv: File too large; its rows wait"):
            file.append({"step": "1"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            file.append({"step": "2"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(file.path) == []
    file.append({"step": "3"})
    assert [row["step"] for row in read(file.path)] == ["1", "2", "3"]
