"""`models` lists every model with our counts beside the document's; docs/models.md is the same table."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from fat_train import list_models
from fat_train.__main__ import main
from fat_train.command.models import COMMAND, differences, markdown, rows_of
from fat_train.config import zoo
from fat_train.config.zoo import facts_of
from fat_train.types import UserError

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_that_of_the_models_there_are() -> None:
    written = PAGE.read_text(encoding="utf-8")
    assert written == markdown([facts_of(name) for name in list_models()]), f"renew it: {COMMAND}"


def test_a_row_has_our_counts_and_the_documents_as_it_prints_them() -> None:
    row = ("fat_b2", "FAT", "13,466,728", "2.131 G", "13.5 M", "2.0 G", "81.9", "not yet run")
    assert rows_of([facts_of("fat_b2")]) == [row]
    assert rows_of([facts_of("fat_nano")]) == [("fat_nano", "FAT", "261,032", "0.065 G", "–", "–", "–", "–")]
    reached = replace(facts_of("fat_b2"), top1=Decimal("81.87"))
    assert rows_of([reached])[0][-1] == "81.87"


@pytest.fixture
def others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that takes the place of conf/model."""
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(zoo, "conf_dir", lambda: tmp_path)
    return tmp_path / "model"


def test_a_difference_is_marked_with_the_reason_below_it(others: Path) -> None:
    header = (
        "# A model.\n# paper_params_m: 3.0\n# parameters: 2300000\n# macs_g: 0.700\n# top1: 77.05\n"
        "# params_differ_percent: 23.5\n# The printed number is\n# another model's.\n# Counted at 224 px.\n"
    )
    (others / "x_1.yaml").write_text(header + "_target_: a.b.XNetConfig\nname: x_1  # macs_g: 9.9\n# macs_g: 9.9\n")
    facts = facts_of("x_1")
    row = ("x_1", "XNet", "2,300,000 ≠", "0.700 G", "3.0 M", "–", "–", "77.05")
    assert rows_of([facts]) == [row]
    because = "≠ x_1: 2,300,000 parameters, the document's 3.0 M (-23 %): The printed number is another model's."
    assert differences([facts]) == [because]
    assert f"- {because}\n" in markdown([facts])
    assert "| " + " | ".join(("`x_1`", *row[1:])) + " |" in markdown([facts])


def test_what_rounds_to_the_documents_digits_is_not_marked() -> None:
    nearly = replace(facts_of("fat_b0"), paper_params_m=Decimal("4.494"), params_differ_percent=0.1)
    assert not nearly.differs
    assert replace(nearly, paper_params_m=Decimal("4.495")).differs
    assert rows_of([nearly])[0][2] == "4,494,488"
    assert differences([nearly]) == []


def test_a_model_without_its_counts_is_named(others: Path) -> None:
    (others / "x_1.yaml").write_text("# A model.\n# parameters: 7\n_target_: a.b.XNetConfig\n# macs_g: 9.9\n")
    with pytest.raises(UserError, match=r"conf/model/x_1\.yaml must state `# macs_g: <number>`"):
        facts_of("x_1")


def test_the_command_shows_the_models_of_a_pattern_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "some.md"
    assert main(["models", "pattern=fat_b3*", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "29,196,264" in said
    assert "29,321,896" in said
    assert "fat_b0" not in said
    assert out.read_text() == markdown([facts_of(name) for name in ("fat_b3", "fat_b3_st")])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pattern=fat_b9", "pattern=fat_b9 is no model's name; did you mean fat_b"),
        ("out=models.txt", "out=models.txt must be a file that ends in .md"),
        ("patern=fat_*", "unknown key patern; did you mean pattern?"),
    ],
)
def test_a_wrong_word_is_one_message(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", word]) == 2
    assert said in capsys.readouterr().err
