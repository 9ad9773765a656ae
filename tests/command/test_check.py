"""`check` finds before a run what would stop it, and times it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fat_train.__main__ import main


def test_a_good_set_is_read_and_the_hours_are_estimated(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    assert main(["check", "experiment=digits", "seconds=2", f"out={out}", "data.num_workers=1"]) == 0
    printed = capsys.readouterr().out
    assert "digits_demo: good" in printed
    assert "estimate" in printed
    found = json.loads(out.read_text())
    assert found["images_per_s"] > 1
    assert found["data"]["train"]["images"] == 1442
    assert found["plan"]["steps_per_epoch"] == 22
    assert not (tmp_path / "runs").exists()


def test_synthetic_images_need_no_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "model=fat_nano", "data=synthetic", "seconds=0", f"out={tmp_path / 'check.json'}"]
    assert main(words) == 0
    assert "data" not in json.loads((tmp_path / "check.json").read_text())
