"""`check augment` says whether the augmentation is timm's, and ends with 2 where it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from fat_train.__main__ import main
from fat_train.augment import draws as augment_draws
from fat_train.augment.policy import Op
from fat_train.report import drawn


def words(out: Path, *more: str) -> list[str]:
    return ["check", "augment", "images=1", "draws=1000", f"out={out}", *more]


def test_without_any_data_it_takes_the_embedded_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    out = tmp_path / "new" / "sheet.png"
    assert main(words(out)) == 0
    printed = capsys.readouterr().out
    assert "scikit-learn's two photographs" in printed
    assert "FAILS" not in printed
    found = json.loads(out.with_suffix(".json").read_text())
    assert {row["name"] for row in found["pictures"]} >= {op.name.lower().replace("_", " ") for op in Op}
    assert all(row["holds"] for row in found["draws"])
    with Image.open(out) as sheet:
        assert 1000 < sheet.width <= 2500


def test_without_dali_the_draws_are_compared_alone_and_a_wrong_policy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fat_train.data.datamodule._dali_is_installed", lambda: False)

    def flips_too_often(*arguments: object) -> augment_draws.Draws:
        draws = augment_draws.draw(*arguments)
        draws.flip[:200] = True
        return draws

    monkeypatch.setattr(drawn, "draw", flips_too_often)
    out = tmp_path / "sheet.png"
    assert main(words(out)) == 2
    said = capsys.readouterr()
    assert "PIL and timm are the only back end here" in said.out
    assert "rows above that fail: flips\n" in said.err
    assert not out.exists()
    assert "pictures" not in json.loads(out.with_suffix(".json").read_text())


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("images=0", "images must be at least 1"),
        ("draws=10", "draws must be at least 1,000"),
        ("out=sheet.jpg", r"must be a file that ends in \.png"),
        ("imges=3", "unknown key imges"),
        ("data.root=/nowhere/at/all", r"data\.root=/nowhere/at/all is not there: give a folder of images"),
    ],
)
def test_a_wrong_word_is_answered(word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path / "sheet.png", word)) == 2
    assert re.search(said, capsys.readouterr().err)
