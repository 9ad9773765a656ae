from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fat_train.report.metrics import read_metrics
from fat_train.types import MissingPathError, UserError


def test_epochs_rows_and_the_rows_between_are_told_apart(write_run: Callable[..., Path]) -> None:
    metrics = read_metrics(write_run())
    assert metrics.epochs("step").tolist() == [10, 20, 30]
    assert metrics.between("step").tolist() == [5, 10, 15, 20, 25, 30]
    assert metrics.epochs("val/top1").tolist() == [50, 90, 80]
    assert np.isnan(metrics.between("val/top1")).all()
    assert metrics.steps_per_epoch == 10


def test_a_first_epoch_under_way_has_no_length_yet(write_run: Callable[..., Path]) -> None:
    assert read_metrics(write_run(top1=[], steps=7)).steps_per_epoch is None


def test_a_missing_folder_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"^run=.*/nowhere must be the folder of a run .* no such folder$"):
        read_metrics(tmp_path / "nowhere")


def test_a_folder_that_is_no_run_is_named_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"^run=.* it holds no metrics\.csv$"):
        read_metrics(tmp_path)


def test_a_run_without_a_row_is_named_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,step\n")
    with pytest.raises(UserError, match=r"^run=.* has no row yet$"):
        read_metrics(tmp_path)
