"""Every way of every operation is timed at a model's sizes, shown in a table and kept beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.benchmark.op_table import markdown, refused, rows_of, verdict
from fat_train.op import choice, table
from fat_train.op.table import Milliseconds, Row

KEY = ("norm", "torch.bfloat16", "2", "8", "4", "4")
WRONG = ("depthwise", "torch.bfloat16", "2", "8", "4", "4", "5", "1", "True")
COUNTS = {KEY: 3, WRONG: 1}
MEASURED = table.empty(torch.device("cpu")).with_rows(
    {
        KEY: Row(KEY, "triton", {"torch": Milliseconds(1.0, 4.0), "triton": Milliseconds(0.5, 1.0)}, {}, 500, 1250),
        WRONG: Row(WRONG, "torch", {"torch": Milliseconds(2.0, 3.0)}, {"triton": "its error is 1.0"}, 500, 1250),
    }
)


def test_the_table_has_a_row_a_way_and_names_what_is_refused() -> None:
    rows = list(rows_of(MEASURED, COUNTS, copy_rate=5e6))
    assert rows == [
        ("norm", "2x8x4x4", "3", "torch", "1.000", "4.000", "1.00", "6%"),
        ("", "", "", "triton*", "0.500", "1.000", "4.00", "25%"),
        ("depthwise", "2x8x4x4 k5 s1 + x", "1", "torch*", "2.000", "3.000", "1.00", "8%"),
        ("", "", "", "triton", "refused: its error is 1.0", "", "", ""),
    ]
    assert refused(MEASURED) == ["triton is refused for depthwise 2x8x4x4 k5 s1 + x: its error is 1.0"]


def test_the_verdict_weighs_each_case_by_how_often_the_model_has_it() -> None:
    assert verdict(MEASURED, COUNTS) == [
        "all of them: 6.00 ms of forward and backward, 15.00 by torch: 2.50 x",
        "depthwise: 3.00 ms of forward and backward, 3.00 by torch: 1.00 x",
        "norm: 3.00 ms of forward and backward, 12.00 by torch: 4.00 x",
    ]
    text = markdown({"a model": (MEASURED, COUNTS, ["a line"])}, copy_rate=5e6)
    assert "**a model**" in text
    assert "| norm | 2x8x4x4 | 3 | torch |" in text
    assert "- a line" in text


def test_the_command_times_all_ways_and_changes_nothing_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "op.json"
    words = ["models=[fat_nano]", "device=cpu", "batch_size=1", "image_px=32", "rounds=1", "precision=32"]
    assert main(["benchmark", "op", *words, f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert "all of them: " in said
    assert "op=auto        is a fixed choice on a CPU" in said
    assert not (tmp_path / "cache").exists()
    assert not choice._fastest
    (title, kept), *_ = json.loads(out.read_text())["models"].items()
    assert title == "fat_nano, 1 images of 32 px, precision 32"
    assert {row["key"][0] for row in kept["rows"]} == set(choice.WAYS)
    assert all(row["times"][row["way"]] for row in kept["rows"])
    assert f"**{title}**" in out.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("models=[fat_b9]", "unknown model fat_b9; did you mean"),
        ("precision=bf16", "did you mean bf16-mixed?"),
        ("device=tpu", "(allowed: auto, cpu, gpu)"),
        ("rounds=0", "rounds must be at least 1; got 0"),
        ("image_px=16", "image_px must be at least 32"),
        ("out=/tmp", "must be a file that ends in .json"),
    ],
)
def test_a_wrong_word_is_one_message(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "op", word]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_the_fastest_ways_are_kept_for_the_runs_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    words = ["model=fat_nano", "device=gpu", "batch_size=2", "image_px=64", "rounds=2", f"out={tmp_path}/op.json"]
    assert main(["benchmark", "op", *words]) == 0
    found = table.load(table.path_of(tmp_path / "cache", torch.device("cuda")))
    assert found is not None
    assert {key[0] for key in found.rows} == set(choice.WAYS)
    assert not [row for row in found.rows.values() if row.refused]
