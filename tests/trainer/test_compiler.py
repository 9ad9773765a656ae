"""Which way of compiling is taken, and what is said where it cannot work."""

from __future__ import annotations

import pytest

from fat_train.trainer import compiler
from fat_train.trainer.build import TrainerConfig
from fat_train.types import UserError


def test_auto_compiles_on_one_gpu_alone_and_only_where_the_compiler_has_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiler, "missing", lambda _: "")
    ways = {kind: compiler.way_to_compile("auto", kind, 1) for kind in ("gpu", "cpu", "mps")}
    assert ways == {"gpu": "default", "cpu": "off", "mps": "off"}
    assert compiler.lines("auto", "gpu", 1) == [
        "compile        default (trainer.compile=auto on a GPU): the first update and the first validation take longer"
    ]
    assert compiler.lines("auto", "cpu", 1) == []
    assert compiler.way_to_compile("auto", "gpu", 8) == "off"
    assert compiler.lines("auto", "gpu", 8) == ["compile        off: several GPUs; trainer.compile=default compiles"]
    monkeypatch.setattr(compiler, "missing", lambda _: "Triton")
    assert compiler.way_to_compile("auto", "gpu", 1) == "off"
    assert compiler.lines("auto", "gpu", 1) == ["compile        off: this machine lacks Triton"]
    compiler.refuse_impossible("auto", "gpu", grad_checkpointing=False, accumulates=False)


@pytest.mark.parametrize(
    ("kind", "lacking"),
    [("cpu", r"a C\+\+ compiler \(no-such-compiler, or CXX\)"), ("gpu", r"a C compiler \(no-such-compiler, or CC\)")],
)
def test_a_machine_without_a_compiler_is_told_before_the_run(
    kind: str, lacking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-such-compiler")
    with pytest.raises(UserError, match=rf"trainer\.compile=default needs .*{lacking}.*trainer\.compile=off"):
        compiler.refuse_impossible("true", kind, grad_checkpointing=False, accumulates=False)
    compiler.refuse_impossible("off", kind, grad_checkpointing=False, accumulates=False)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("regionl", r"trainer\.compile=regionl is not known; did you mean regional\? \(allowed: auto, off, default"),
        ("yes", r"trainer\.compile=yes is not known"),
    ],
)
def test_an_unknown_word_is_answered_by_the_nearest(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        TrainerConfig(compile=word)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compile": "reduce-overhead"}, "is for GPUs; on cpu give default, regional or off"),
        ({"compile": "regional", "grad_checkpointing": True}, "give trainer.compile=default"),
    ],
)
def test_ways_that_do_not_go_together_with_the_run_are_refused(
    settings: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "missing", lambda _: "")
    with pytest.raises(UserError, match=said):
        TrainerConfig(accelerator="cpu", **settings).refuse_impossible()


def test_cuda_graphs_are_refused_where_gradients_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "missing", lambda _: "")
    with pytest.raises(UserError, match=r"does not go with accumulated gradients; give trainer\.compile=default"):
        compiler.refuse_impossible("reduce-overhead", "gpu", grad_checkpointing=False, accumulates=True)
    compiler.refuse_impossible("reduce-overhead", "gpu", grad_checkpointing=False, accumulates=False)
