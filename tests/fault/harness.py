"""Trainings in processes of their own that are killed, started again by the same command, and compared."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import read_rows
from fat_train.types import UserError
from fault.runner import Plan

RUNNER = Path(__file__).with_name("runner.py")
LIFE_AT_MOST_S = 400
OTHERS_END_WITHIN_S = 20
TIMES = ("images_per_s", "epoch_s")
"""Columns of metrics.csv that tell of the machine, not of the run."""
NOT_OF_THE_RUN = ("elapsed_s", "paused_s", "config", "git", "loops")
"""Keys of checkpoints that hold times, the newest start's words and checkout, or Lightning's counters (never read)."""


@dataclass(frozen=True)
class At:
    """A named moment: `point` of `fault.runner.POINTS`, passed for the `call`-th time in that life by `rank`."""

    point: str
    call: int = 1
    rank: int = 0
    whole_group: bool = True

    def __str__(self) -> str:
        whom = "" if self.whole_group else f", rank {self.rank} alone"
        return f"{self.point} #{self.call}{whom}"


@dataclass(frozen=True)
class After:
    """A moment of the clock: seconds after the start of the life, or after the first update of the life."""

    seconds: float
    training: bool = False
    rank: int | None = None
    """This rank alone; None kills the whole group."""

    def __str__(self) -> str:
        since = "its first update" if self.training else "the start"
        whom = "" if self.rank is None else f", rank {self.rank} alone"
        return f"{self.seconds:.2f} s after {since}{whom}"


Moment = At | After


class MicroBatch(NamedTuple):
    """Key of the image stream."""

    update: int
    micro_batch: int
    rank: int


@dataclass
class Life:
    """What happened between one start of the command and its end."""

    number: int
    moment: Moment | None
    status: int
    said: str
    killed: bool
    """By us, at the moment asked for; else it ended before that."""
    others: str
    """How the other processes ended, where one rank alone was killed."""
    first_update: int | None
    """Update that its first batch was for; None where it made none."""
    last_update: int | None
    checkpoint: int | None
    """Updates in last.ckpt afterwards; None where there is none."""


@dataclass
class Training:
    """One command line and its run folder; each `live` starts it once more.

    Args:
        words: of the command, without folder.
        folder: taken by the run and by the records of it.
    """

    words: Sequence[str]
    folder: Path
    drag_s: float = 0.0
    """As in `Plan`."""
    lives: list[Life] = field(default_factory=list)
    seconds: float = math.nan
    """From start to end of the newest life."""
    start_s: float = math.nan
    """From start to first update of the newest life that was not killed before."""

    def __post_init__(self) -> None:
        self.record = self.folder / "record"
        self.run = self.folder / "runs" / "run"
        self.record.mkdir(parents=True, exist_ok=True)

    @property
    def processes(self) -> int:
        return int(self._word("trainer.devices", "1"))

    @property
    def backend(self) -> str:
        return self._word("data.backend", "dali")

    def _word(self, key: str, default: str) -> str:
        return dict([f"{key}={default}".split("=", 1), *(word.split("=", 1) for word in self.words)])[key]

    def live(self, moment: Moment | None = None) -> Life:
        """Start the command; kill it at the moment, or let it run to its end."""
        number = len(self.lives) + 1
        plan = Plan(str(self.record), number, drag_s=self.drag_s)
        if isinstance(moment, At):
            plan = plan._replace(point=moment.point, call=moment.call, rank=moment.rank, whole_group=moment.whole_group)
        output = self.record / f"output-{number}"
        size = self._recorded()
        command = [sys.executable, str(RUNNER), json.dumps(plan)]
        command += [*self.words, f"folder={self.run.parent}", f"name={self.run.name}"]
        began = time.monotonic()
        others = ""
        whole_group = moment.whole_group if isinstance(moment, At) else moment is None or moment.rank is None
        with output.open("w") as file, own_group(command, file) as process:
            if moment is None or (isinstance(moment, After) and moment.training):
                while process.poll() is None and self._recorded() == size:
                    assert time.monotonic() < began + LIFE_AT_MOST_S, f"life {number} never trained"
                    time.sleep(0.002)
                self.start_s = time.monotonic() - began
            if isinstance(moment, After):
                due = moment.seconds + (self.start_s if moment.training else 0)
                while process.poll() is None and time.monotonic() < began + due:
                    time.sleep(0.002)
                if process.poll() is None:
                    self._kill(moment, number, process)
            deadline = began + LIFE_AT_MOST_S
            while process.poll() is None and time.monotonic() < deadline:
                if number in self._kills():
                    deadline = min(deadline, time.monotonic() + OTHERS_END_WITHIN_S)
                time.sleep(0.05)
            status = process.poll()
            if not whole_group and number in self._kills():
                others = others_of(process.pid)
        self.seconds = time.monotonic() - began
        updates = [key.update for life, key, _ in self._stream() if life == number]
        life = Life(
            number,
            moment,
            status if status is not None else -signal.SIGKILL,
            output.read_text(errors="replace"),
            killed=number in self._kills(),
            others=others if status is not None else f"rank 0 still there after {OTHERS_END_WITHIN_S} s",
            first_update=updates[0] if updates else None,
            last_update=max(updates, default=None),
            checkpoint=updates_in(self.run / "checkpoints" / "last.ckpt"),
        )
        self.lives.append(life)
        return life

    def finish(self) -> Life:
        """Start the command once more and let it run to its end, which must be a good one."""
        life = self.live()
        assert life.status == 0, f"life {life.number} ended with {life.status}:\n{life.said}"
        return life

    def stream(self) -> dict[MicroBatch, str]:
        """Images of each micro-batch over all lives.

        Raises:
            AssertionError: two lives saw different images in the same place.
        """
        seen: dict[MicroBatch, str] = {}
        for life, key, images in self._stream():
            assert seen.setdefault(key, images) == images, f"life {life} saw other images than one before: {key}"
        return seen

    def updates(self) -> dict[int, list[str]]:
        """Images of each update that some life fed to the end, whatever the number of processes.

        Raises:
            AssertionError: two lives saw different images in the same update.
        """
        fed: dict[tuple[int, int], list[str]] = {}
        for life, key, images in self._stream():
            fed.setdefault((key.update, life), []).extend(images.split())
        whole = max(len(images) for images in fed.values())
        seen: dict[int, list[str]] = {}
        for (update, life), images in sorted(fed.items()):
            if len(images) == whole:
                images.sort()
                assert seen.setdefault(update, images) == images, f"life {life} saw other images: {update}"
        return seen

    def _stream(self) -> Iterator[tuple[int, MicroBatch, str]]:
        for file in sorted(self.record.glob("stream-*")):
            rank = int(file.name.rpartition("-")[2])
            for line in file.read_text().splitlines():
                life, update, micro_batch, images = line.split(" ", 3)
                yield int(life), MicroBatch(int(update), int(micro_batch), rank), images

    def _kills(self) -> set[int]:
        path = self.record / "kills"
        return {int(line) for line in path.read_text().split()} if path.exists() else set()

    def _recorded(self) -> int:
        stream = self.record / "stream-0"
        return stream.stat().st_size if stream.exists() else 0

    def _kill(self, moment: After, number: int, process: subprocess.Popen[bytes]) -> None:
        with (self.record / "kills").open("a") as file:
            file.write(f"{number}\n")
        if moment.rank:
            ranks = [pid for pid in members(process.pid) if environment(pid).get("LOCAL_RANK") == str(moment.rank)]
            for pid in ranks[:1]:
                os.kill(pid, signal.SIGKILL)
        elif moment.rank == 0:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def random_moments(seed: int, count: int, like: Training) -> list[Moment]:
    """Moments of the clock: every third in a start, the others in the first third of a training, as `like`'s were."""
    rng = random.Random(seed)
    third_s = (like.seconds - like.start_s) / 3
    return [
        After(rng.uniform(0, like.start_s)) if number % 3 == 2 else After(rng.uniform(0, third_s), training=True)
        for number in range(count)
    ]


@contextmanager
def own_group(command: Sequence[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process, and whatever it starts: none of them outlives the block, nor do their temporary files."""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if members(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            while members(process.pid):
                time.sleep(0.01)


def members(group: int) -> list[int]:
    """Living processes of a group; a dead one that nobody has asked for yet is none."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                state, _, of_group = (folder / "stat").read_text().rpartition(") ")[2].split()[:3]
            except OSError:
                continue
            if int(of_group) == group and state not in "ZX":
                found.append(int(folder.name))
    return sorted(found)


def environment(pid: int) -> dict[str, str]:
    try:
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def others_of(group: int) -> str:
    """How the rest of a group ends whose first process is gone."""
    began = time.monotonic()
    while members(group) and time.monotonic() < began + OTHERS_END_WITHIN_S:
        time.sleep(0.05)
    left = len(members(group))
    return f"{left} still there after {OTHERS_END_WITHIN_S} s" if left else "ended"


def updates_in(checkpoint: Path) -> int | None:
    """Updates that a checkpoint has behind it; None where there is none, -1 where it cannot be read."""
    try:
        return int(read_checkpoint(checkpoint)["global_step"]) if checkpoint.exists() else None
    except UserError:
        return -1


def differences(ours: Training, theirs: Training) -> list[str]:
    """Everything in which two finished runs differ that must not: images, rows, files, and all that these hold."""
    found = []
    if ours.stream() != theirs.stream():
        found.append("image stream")
    our_rows, their_rows = (rows_of(training.run) for training in (ours, theirs))
    if our_rows != their_rows:
        found.append(f"rows of metrics.csv:\n  {our_rows}\n  {their_rows}")
    our_files, their_files = (files_of(training.run) for training in (ours, theirs))
    if our_files != their_files:
        found.append(f"files: {our_files} instead of {their_files}")
    for name in sorted({*our_files} & {*their_files}):
        if name.endswith(".ckpt"):
            pair = [read_checkpoint(training.run / name) for training in (ours, theirs)]
            found += [f"{name}: {what}" for what in differences_in(*pair)]
    return found


def rows_of(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the machine's times; whether a row has any is kept."""
    return [row | {name: "some" for name in TIMES if row[name]} for row in read_rows(run / "metrics.csv")]


def files_of(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def differences_in(ours: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Paths at which two checkpoints differ, but for times and for the place of the run's folder."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        ours, theirs = ({name_of(key): value for key, value in side.items()} for side in (ours, theirs))
        yield from (f"{where}.{key} is in one alone" for key in sorted(map(str, {*ours} ^ {*theirs})))
        for key in {*ours} & {*theirs}:
            if key not in NOT_OF_THE_RUN:
                yield from differences_in(ours[key], theirs[key], f"{where}.{key}")
        return
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from differences_in(*pair, f"{where}[{number}]")
        return
    else:
        same = name_of(ours) == name_of(theirs)
    if not same:
        yield f"{where}: {str(ours)[:60]} and {str(theirs)[:60]}"


def name_of(value: Any) -> Any:
    """A file's name without the run's folder; anything else as it is."""
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


HEADS = ("no.", "killed at", "at update", "processes", "back end", "last.ckpt held", "went on at", "others", "equal")


def table(trainings: Mapping[str, tuple[Training, Training]]) -> str:
    """A row a kill, in Markdown. `trainings`: name -> the killed one and the unbroken one."""
    rows: list[Sequence[str]] = [HEADS, ["---"] * len(HEADS)]
    for killed, unbroken in trainings.values():
        equal = "no" if differences(killed, unbroken) else "yes"
        for life in killed.lives:
            if not life.killed:
                continue
            later = [other.first_update for other in killed.lives[life.number :] if other.first_update is not None]
            rows.append(
                (
                    str(len(rows) - 1),
                    str(life.moment),
                    shown(life.last_update, "none yet"),
                    str(killed.processes),
                    killed.backend,
                    shown(life.checkpoint, "not there"),
                    shown(later[0] if later else None, "no more"),
                    life.others or "–",
                    equal,
                )
            )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def shown(number: int | None, nothing: str) -> str:
    return nothing if number is None else str(number)
