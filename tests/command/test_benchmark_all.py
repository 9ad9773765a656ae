"""One command runs everything that a machine with a GPU is to show, and writes it into a log."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.command.benchmark_all import AllBenchmarksSettings, Step, run_steps, steps_of


def test_without_a_gpu_it_says_so_in_a_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["benchmark", "all", f"folder={tmp_path}/all", f"log={tmp_path}/log.md"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "Error: torch finds no GPU here: these benchmarks are for a machine with one\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tables_are_appended_and_a_failure_is_named_and_does_not_stop_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAT_TRAIN_CACHE", str(tmp_path / "cache"))
    folder, log = tmp_path / "all", tmp_path / "docs" / "log.md"
    log.parent.mkdir()
    log.write_text("# Log\n")
    folder.mkdir()
    (folder / "gone.md").write_text("of an earlier run")
    tiny = ["model=fat_nano", "device=cpu", "batch_size=2", "image_px=32", "rounds=1", f"out={folder}/op.json"]
    steps = [
        Step("gone", ["-c", "raise SystemExit(2)"]),
        Step("op", ["-m", "fat_train", "benchmark", "op", *tiny]),
        Step("words", ["-c", "import os; print(os.environ['WORD']); print('3 passed')"], {"WORD": "given"}),
    ]
    assert run_steps(steps, folder, log) == ["gone"]
    text = log.read_text()
    assert text.startswith("# Log\n\n## ")
    assert f"torch {torch.__version__}" in text
    gone, op, words = (text.index(f"**{name}**, `python ") for name in ("gone", "op", "words"))
    assert "FAILED with status 2" in text[gone:op]
    assert "of an earlier run" not in text
    assert "| operation | sizes |" in text[op:words]
    assert "FAILED" not in text[op:]
    assert text.endswith("> 3 passed\n")
    assert "given" in (folder / "words.txt").read_text()
    assert "given" in capfd.readouterr().out


def test_every_model_is_timed_and_every_benchmark_writes_into_the_folder(tmp_path: Path) -> None:
    settings = AllBenchmarksSettings(tests=str(tmp_path), models=["fat_b0", "fat_b3"])
    steps = {step.name: step for step in steps_of(settings, tmp_path)}
    assert list(steps) == ["tests", "tests of torch.compile", "op", "model", "step"]
    assert steps["tests of torch.compile"].environment == {"JAXTYPING_DISABLE": "1"}
    for name in ("op", "model"):
        assert "models=[fat_b0,fat_b3]" in steps[name].words
    for name in ("op", "model", "step"):
        assert f"out={tmp_path}/{name}.json" in steps[name].words


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("models=[]", "models must name at least one"),
        ("models=[fat_b9]", "unknown model fat_b9"),
        ("log=log.txt", "must be a Markdown file"),
        ("tests=nowhere", "tests=nowhere is not a folder"),
    ],
)
def test_a_wrong_word_is_one_message(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "all", word]) == 2
    assert said in capsys.readouterr().err
