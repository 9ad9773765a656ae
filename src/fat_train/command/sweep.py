"""-m: one training per combination of values, one after another, each a process of its own that resumes by itself."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from omegaconf import OmegaConf

from fat_train.checkpoint.run_folder import RunFolder
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.command import train
from fat_train.command.assemble import open_run, plan_of
from fat_train.command.say import is_rank_zero, say, this_python
from fat_train.config.compose import compose
from fat_train.config.run import Problems, RunConfig, plain, resolve_run
from fat_train.config.sweep import sweep_cells, sweep_place
from fat_train.data.datamodule import DataSource
from fat_train.metric.record import format_duration
from fat_train.report.manifest import MANIFEST_FILE, Cell, Manifest, read_manifest, write_manifest
from fat_train.report.sweep import cell_table, percent
from fat_train.report.sweep_rows import FINISHED, read_result
from fat_train.trainer.plan import RunPlan
from fat_train.types import EXIT_HUNG, EXIT_UNFINISHED, UserError, some

ASKED_TO_LEAVE = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
INTERRUPTED = 130
SOME_FAILED = 1


def run(words: Sequence[str], extra_dir: Path | None = None, only: int | None = None) -> int:
    """Train the runs of a sweep, or go on with them.

    Args:
        words: of the sweep, some with several values.
        extra_dir: a folder of the user's own yamls.
        only: number of the one run to train, from 0, in this process; None trains all, a process each.

    Returns:
        Exit status: 0 when all are finished, 1 when some failed, 75 or 130 when the sweep was asked to leave.

    Raises:
        UserError: something to mend, in the words or on disk, before any run starts.
        UnfinishedRunError: the one run was asked to leave.
    """
    cells = sweep_cells(words, extra_dir)
    if only is not None and not 0 <= only < len(cells):
        raise UserError(f"--cell {only} is not there: this sweep has {len(cells)} runs, 0 to {len(cells) - 1}")
    _, folder = sweep_place(words, extra_dir)
    if only is not None:
        tree = compose("train", _words_of(cells[only], folder), extra_dir)
        _keep_manifest(_typed(plain(tree)).root.parent, cells)
        say(f"{_number(only, len(cells))}  {cells[only].name}")
        train.run(tree)
        return 0
    runs = _ready(cells, folder, extra_dir)
    folder = runs[0].config.root.parent
    _keep_manifest(folder, cells)
    states: dict[str, str] = {}
    with Relay() as relay:
        status = _train_all(runs, extra_dir, relay, states)
    say("\n" + cell_table([read_result(folder, cell) for cell in cells], states))
    if status in (EXIT_UNFINISHED, INTERRUPTED):
        say("left early     the same command goes on")
    say(f"report         {this_python()} -m fat_train report {shlex.quote(f'sweep={folder}')}")
    return status


def show(words: Sequence[str], extra_dir: Path | None = None, only: int | None = None) -> str:
    """The configurations of the runs as yaml, a document each.

    Raises:
        UserError: as `run` does for words.
    """
    cells, (_, folder) = sweep_cells(words, extra_dir), sweep_place(words, extra_dir)
    return "".join(
        f"--- # {_number(number, len(cells))}  {cell.name}\n"
        + OmegaConf.to_yaml(compose("train", _words_of(cell, folder), extra_dir), resolve=True)
        for number, cell in enumerate(cells)
        if only in (None, number)
    )


class Relay:
    """Hands signals on to the process that trains, and remembers that the sweep was asked to leave.

    A terminal's Ctrl-C reaches that process by itself.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._child: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Relay:
        self._former = {number: signal.signal(number, self._take) for number in (*ASKED_TO_LEAVE, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def run(self, command: list[str]) -> int:
        """Run a process to its end; its exit status, negative for a signal that killed it."""
        self._child = subprocess.Popen(command)
        if self.received is not None and self.received in ASKED_TO_LEAVE:  # while it was being started
            self._child.send_signal(self.received)
        return self._child.wait()

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        if self._child is not None and number in ASKED_TO_LEAVE:
            self._child.send_signal(number)


@dataclass(frozen=True)
class _Run:
    cell: Cell
    words: list[str]
    values: dict[str, Any]
    config: RunConfig
    plan: RunPlan

    def is_finished(self) -> bool:
        """Whether its own process would find nothing to do; in doubt not, so that the process says what it finds."""
        folder = RunFolder(self.config.root)
        there = folder.last.is_file() and folder.config.is_file()
        if self.config.run.resume != "auto" or not there or folder.config_diff(self.values):
            return False
        try:
            saved = read_checkpoint(folder.last)
        except UserError:
            return False
        about = saved.get("fat_train", {})
        updates, epoch_ended = about.get("position", (0, False))  # a run may have left in its very last validation
        same = about.get("steps_per_epoch") == self.plan.steps_per_epoch
        return same and epoch_ended and updates >= self.plan.total_steps


def _train_all(runs: list[_Run], extra_dir: Path | None, relay: Relay, states: dict[str, str]) -> int:
    """Train one after another, writing each one's state down; returns the sweep's exit status."""
    options = [] if extra_dir is None else ["--config-dir", str(extra_dir)]
    failed = False
    for at, one in enumerate(runs):
        if relay.received:
            break
        number = _number(at, len(runs))
        if one.is_finished():
            say(f"{number}  {one.cell.name} was finished before: {_outcome(one)}")
            continue
        say(f"\n{number}  {one.cell.name}")
        begin = time.monotonic()
        status = relay.run([sys.executable, "-m", "fat_train", *options, *one.words])
        states[one.cell.name] = _state(status)
        failed = failed or status not in (0, EXIT_UNFINISHED, INTERRUPTED)
        say(f"{number}  {_state(status)} after {format_duration(time.monotonic() - begin)}: {_outcome(one)}")
        if status in (EXIT_UNFINISHED, INTERRUPTED) and not relay.received:
            return status
    if relay.received:
        return INTERRUPTED if relay.received == signal.SIGINT else EXIT_UNFINISHED
    return SOME_FAILED if failed else 0


def _ready(cells: list[Cell], folder: Path, extra_dir: Path | None) -> list[_Run]:
    """Compose and check every run, and list every data set, before the first run starts.

    Raises:
        UserError: everything that is wrong with any of them, in one message.
    """
    sources: dict[str, DataSource] = {}
    runs: list[_Run] = []
    wrong: dict[str, list[str]] = {}
    for cell in cells:
        words = _words_of(cell, folder)
        try:
            values = plain(compose("train", words, extra_dir))
            config = _typed(values)
            about_data = repr((config.data, config.trainer, config.debug))
            if about_data not in sources:
                _, sources[about_data] = open_run(values)
            runs.append(_Run(cell, words, values, config, plan_of(config, sources[about_data])))
        except UserError as error:
            wrong.setdefault(str(error), []).append(cell.name)
    if wrong:
        told = [text if len(names) == len(cells) else f"{some(names)}: {text}" for text, names in wrong.items()]
        raise UserError("\n".join(told) + "\nNo run of the sweep was started")
    if len({one.config.root.parent for one in runs}) > 1:
        raise UserError("some runs of this sweep are for debugging, and others are not; they do not go together")
    return runs


def _keep_manifest(folder: Path, cells: list[Cell]) -> None:
    """Write down what the sweep in the folder consists of, with what it consisted of before."""
    if not is_rank_zero():
        return
    manifest = Manifest(sorted(cells[0].values), cells)
    if (folder / MANIFEST_FILE).is_file():
        former = read_manifest(folder)
        manifest = manifest.joined_to(former, folder)
        _say_changes(former, cells)
    elif RunFolder(folder).files():
        raise UserError(f"{folder} is the folder of a run, not of a sweep. Give another name=<name>")
    write_manifest(folder, manifest)


def _say_changes(former: Manifest, cells: list[Cell]) -> None:
    """What the words that all runs share say otherwise than before."""
    before = {cell.name: cell for cell in former.cells}.get(cells[0].name, former.cells[-1])
    old, new = (
        {word for word in cell.words if word.lstrip("+").partition("=")[0] not in cell.values}
        for cell in (before, cells[0])
    )
    if old != new:
        gone, come = (" ".join(sorted(words)) or "(nothing)" for words in (old - new, new - old))
        say(f"changed        {gone} -> {come}; runs that this command does not name are as they were")


def _typed(values: dict[str, Any]) -> RunConfig:
    problems = Problems()
    config = resolve_run(values, problems)
    problems.raise_if_any()
    assert config is not None
    return config


def _words_of(cell: Cell, folder: Path) -> list[str]:
    return [*cell.words, f"folder={folder}", f"name={cell.name}"]


def _number(at: int, count: int) -> str:
    return f"cell {at + 1}/{count}"


def _state(status: int) -> str:
    named = {0: FINISHED, EXIT_UNFINISHED: "left early", INTERRUPTED: "interrupted", EXIT_HUNG: "failed (hung)"}
    if status < 0:
        return f"failed ({signal.Signals(-status).name})"
    return named.get(status, f"failed (status {status})")


def _outcome(one: _Run) -> str:
    result = read_result(one.config.root.parent, one.cell)
    return f"best val/top1 {percent(result.best['val/top1'])}, epochs {result.progress}"
