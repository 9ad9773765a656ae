"""benchmark all: tests and benchmarks of a machine with a GPU, one after another, their tables appended to a log."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig

from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.config.zoo import load_model_node
from fat_train.metric.record import format_duration
from fat_train.op.table import triton_version
from fat_train.report.machine import machine_facts
from fat_train.trainer.build import PRECISIONS
from fat_train.types import UnfinishedRunError, UserError, one_of


@dataclass(frozen=True, kw_only=True)
class AllBenchmarksSettings:
    """The whole of `conf/benchmark_all.yaml`."""

    models: list[str] = field(default_factory=lambda: ["fat_b0", "fat_b1", "fat_b2", "fat_b3"])
    """Whose operations and steps are timed; a whole training step is timed of the first."""
    tests: str | None = None
    """Folder with the project's tests: those that need a GPU run first; null runs none."""
    precision: str = "bf16-mixed"
    """32, bf16-mixed or 16-mixed, as of the trainer."""
    folder: str = "runs/benchmark_all"
    """Where the benchmarks' own files go, and what they printed."""
    log: str = "docs/log.md"
    """Markdown file to which the tables are appended."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("models must name at least one")
        for name in self.models:
            load_model_node(name)
        one_of("precision", self.precision, PRECISIONS)
        if Path(self.log).suffix != ".md":
            raise UserError(f"log must be a Markdown file (.md); got {self.log}")
        if self.tests is not None and not Path(self.tests).is_dir():
            raise UserError(f"tests={self.tests} is not a folder")


class Step(NamedTuple):
    """A command line that writes `<name>.md` into the folder, or whose last line is its result."""

    name: str
    words: Sequence[str]
    """After this Python."""
    environment: dict[str, str] = {}  # noqa: RUF012 - read only


def run(tree: DictConfig) -> None:
    """Run all; what fails is said in the log, and the others go on.

    Raises:
        UserError: a wrong setting, or no GPU.
        UnfinishedRunError: something failed.
    """
    settings = resolve(plain(tree), AllBenchmarksSettings, where="")
    if not torch.cuda.is_available():
        raise UserError("torch finds no GPU here: these benchmarks are for a machine with one")
    folder = Path(settings.folder).expanduser()
    failed = run_steps(steps_of(settings, folder), folder, Path(settings.log).expanduser())
    if failed:
        raise UnfinishedRunError(f"failed: {', '.join(failed)}", status=1)


def steps_of(settings: AllBenchmarksSettings, folder: Path) -> list[Step]:
    """Tests; operations, which also chooses the kernels of what follows; models; a step of training."""
    models, steps = f"models=[{','.join(settings.models)}]", []
    if settings.tests is not None:
        steps = [
            Step("tests", ["-m", "pytest", "-q", settings.tests, "-m", "gpu and not compile"]),
            Step(
                "tests of torch.compile",
                ["-m", "pytest", "-q", settings.tests, "-m", "gpu and compile"],
                {"JAXTYPING_DISABLE": "1"},
            ),
        ]
    words = {
        "op": [models, "device=gpu", f"precision={settings.precision}"],
        "model": [models, "device=gpu", f"precision={settings.precision}", "modes=[train,infer]"],
        "step": [
            *(f"model={settings.models[0]}", "data=synthetic"),
            *("trainer.accelerator=gpu", f"trainer.precision={settings.precision}", f"folder={folder}"),
        ],
    }
    for name, own in words.items():
        steps.append(Step(name, ["-m", "fat_train", "benchmark", name, *own, f"out={folder / name}.json"]))
    return steps


def run_steps(steps: Sequence[Step], folder: Path, log: Path) -> list[str]:
    """Run them, each to its end before the next; returns the names of those that failed.

    Args:
        steps: what.
        folder: where `<name>.md` and `<name>.txt`, all that was printed, are.
        log: to which a section is appended, step after step: an end half-way loses nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        _append(log, headline(folder))
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    failed = []
    for number, step in enumerate(steps, 1):
        command = shlex.join(["python", *step.words])
        say(f"\n{number} of {len(steps)}         {command}")
        table = folder / f"{step.name}.md"
        table.unlink(missing_ok=True)  # an earlier run's
        started = time.monotonic()
        status, last = _run(step, folder / f"{step.name}.txt")
        took = format_duration(time.monotonic() - started)
        text = [f"**{step.name}**, `{command}`, {took}" + (f": FAILED with status {status}" if status else "")]
        if status:
            failed.append(step.name)
        text += [table.read_text().strip()] if table.exists() else [f"> {last}"] if last else []
        _append(log, "\n\n".join(text) + "\n")
    say(f"\nappended to    {log}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return failed


def headline(folder: Path) -> str:
    """The section's title, and what it was measured on."""
    facts = machine_facts(folder)
    gpus = [text for name, text in facts.items() if name.startswith("GPU ")]
    hardware = f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if gpus else "none"
    return (
        f"## {datetime.now(UTC):%Y-%m-%d}, all benchmarks on {hardware}\n\n"
        f"Hardware: {hardware} (compute capability {capability}), {facts['CPU cores']} CPU cores, {facts['memory']}; "
        f"torch {facts['torch']}, Triton {triton_version()}, Python {facts['python']}.\n"
    )


def _append(log: Path, text: str) -> None:
    with log.open("a") as out:
        out.write(("\n" if out.tell() else "") + text)


def _run(step: Step, printed: Path) -> tuple[int, str]:
    """Status, and the last line; all lines are shown as they come, and kept."""
    last = ""
    with (
        printed.open("w") as keep,
        subprocess.Popen(
            [sys.executable, *step.words],
            env=os.environ | step.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            keep.write(line)
            last = line.strip() or last
    return process.returncode, last
