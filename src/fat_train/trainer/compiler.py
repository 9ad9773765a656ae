"""What `trainer.compile` comes to on this machine."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from fat_train.model.compiled import CUDA_GRAPHS, OFF, REGIONAL, WAYS
from fat_train.types import UserError, one_of

AUTO = "auto"
FORMER = {"true": "default", "false": OFF}
"""What the setting was when it was a yes or a no."""


def checked_word(word: str) -> str:
    """The word as it is used here.

    Raises:
        UserError: it is not known.
    """
    word = FORMER.get(word.lower(), word)
    one_of("trainer.compile", word, (AUTO, *WAYS))
    return word


def way_to_compile(word: str, kind: str, processes: int) -> str:
    """One of `WAYS` for a device of kind cpu, gpu or mps.

    `auto` compiles where one GPU trains that has what it needs. On a CPU a short run would pay minutes for little; on
    several GPUs the compiled BatchNorm across ranks has yet to be seen at work (docs/log.md).
    """
    word = checked_word(word)
    if word != AUTO:
        return word
    return "default" if kind == "gpu" and processes == 1 and not missing(kind) else OFF


def missing(kind: str) -> str:
    """What torch's compiler lacks here, or nothing."""
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    cc = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    lacks = []
    if kind == "gpu":
        if find_spec("triton") is None:
            lacks.append("Triton (pip install triton)")
        if not any(map(shutil.which, cc)):
            lacks.append(f"a C compiler ({' or '.join(cc)}, or CC)")
    elif shutil.which(cxx) is None:
        lacks.append(f"a C++ compiler ({cxx}, or CXX)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        lacks.append("Python's header files (python3-dev)")
    return ", ".join(lacks)


def refuse_impossible(word: str, kind: str, *, grad_checkpointing: bool, accumulates: bool) -> None:
    """Check a way that was asked for by name; `auto` adapts itself.

    Raises:
        UserError: the machine lacks something, or the way does not go together with the device or another setting.
    """
    word = checked_word(word)
    if word in (AUTO, OFF):
        return
    if lacks := missing(kind):
        raise UserError(f"trainer.compile={word} needs {lacks}; give trainer.compile=off, or install it")
    if word in CUDA_GRAPHS and kind != "gpu":
        raise UserError(f"trainer.compile={word} is for GPUs; on {kind} give default, regional or off")
    if word in CUDA_GRAPHS and accumulates:  # a graph that is replayed writes over the gradient of the batch before
        raise UserError(
            f"trainer.compile={word} does not go with accumulated gradients; give trainer.compile=default, or raise "
            "trainer.max_batch_per_device until the global batch fits at once"
        )
    if word == REGIONAL and grad_checkpointing:
        raise UserError(
            "trainer.compile=regional would compile each block twice with trainer.grad_checkpointing=true; "
            "give trainer.compile=default"
        )


def lines(word: str, kind: str, processes: int) -> list[str]:
    """What to say of it at the start of a run."""
    way, word = way_to_compile(word, kind, processes), checked_word(word)
    if way == OFF:
        if word != AUTO or kind != "gpu":
            return []
        lacks = missing(kind)
        why = f"this machine lacks {lacks}" if lacks else "several GPUs; trainer.compile=default compiles"
        return [f"compile        off: {why}"]
    chosen = " (trainer.compile=auto on a GPU)" if word == AUTO else ""
    return [f"compile        {way}{chosen}: the first update and the first validation take longer"]
