"""`benchmark loader` gives every contestant a rate, or says why it has none."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.data.digits import digits_root


@pytest.mark.slow
def test_every_contestant_has_a_rate_for_the_same_files(
    tmp_path: Path, digits_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "speed.json"
    words = [
        f"data.root={digits_root()}",
        "data.at_most=40",
        "data.image_px=32",
        "data.eval_resize_px=36",
        f"out={out}",
    ]
    words += ["rounds=2", "seconds=0.2", "batch_size=8", "workers=1", "recipes=[crop,full,eval]"]
    assert main(["benchmark", "loader", *words]) == 0
    printed = capsys.readouterr().out
    assert "1 cores feed" in printed
    kept = json.loads(out.read_text())
    files = set()
    for recipe in ("crop", "full", "eval"):
        for outcome in kept["results"][recipe]:
            if outcome["name"] == "ffcv" or ("dali" in outcome["name"] and importlib.util.find_spec("nvidia") is None):
                continue
            assert outcome["why_not"] == "", outcome
            assert len(outcome["rates"]) == 2
            assert min(outcome["rates"]) > 0
            files.add((outcome["facts"]["images"], outcome["facts"]["files"]))
    assert len(files) == 1
    assert out.with_suffix(".md").read_text().count("| timm |") == 3
    assert out.with_suffix(".csv").read_text().count("\nfull,torchvision,") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "data.root is not set"),
        (["data.root=/nowhere"], "data.root=/nowhere is not there"),
        (["contestants=[tim]"], "contestants=tim is not known; did you mean timm?"),
        (["recipes=[ful]"], "recipes=ful is not known; did you mean full?"),
        (["recipes=[]"], "recipes must name at least one"),
        (["rounds=0"], "rounds must be at least 1; got 0"),
        (["seconds=0"], "seconds must be positive"),
        (["data.at_most=0"], "data.at_most must be at least 1"),
        (["worker=2"], "unknown key worker; did you mean workers?"),
        (["out=speed.txt"], "out=speed.txt must be a file that ends in .json"),
    ],
)
def test_a_wrong_word_is_one_message(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "loader", *words]) == 2
    assert expected in capsys.readouterr().err
