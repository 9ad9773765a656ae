"""A run's folder: stable, named by the run and not by the clock, so that the same command finds it again."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from omegaconf import OmegaConf
from yaml import YAMLError

from fat_train.checkpoint.io import find_damage, link_or_copy, write_atomically
from fat_train.types import UserError

HOLDER_LEAVES_WITHIN_S = 20
"""A requeued job can begin while the processes of the one before are still ending."""


class StartingPoint(NamedTuple):
    """Where a run goes on."""

    path: Path
    notes: tuple[str, ...]
    """What was wrong with newer ones."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of last.ckpt and its like."""
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.checkpoints / "last.ckpt"

    @property
    def previous(self) -> Path:
        """The one before it."""
        return self.checkpoints / "previous.ckpt"

    @property
    def metrics(self) -> Path:
        """One row an epoch and every so many updates."""
        return self.root / "metrics.csv"

    @property
    def kernels(self) -> Path:
        """Which way each operation is computed, where that was measured."""
        return self.root / "kernels.json"

    @property
    def config(self) -> Path:
        """The resolved configuration of the newest start."""
        return self.root / "config.yaml"

    def starting_point(self, resume: str, overwrite: bool) -> StartingPoint | None:
        """The newest checkpoint that is whole, or None for a fresh start.

        Raises:
            UserError: resume=never over an existing run without overwrite=true; or every checkpoint is damaged.
        """
        if resume == "never":
            if self.files() and not overwrite:
                raise UserError(
                    f"resume=never would overwrite the run in {self.root} "
                    f"({len(list(self.checkpoints.glob('*.ckpt')))} checkpoints). "
                    "Add overwrite=true to delete it, or give another name=<name>"
                )
            return None
        notes = []
        candidates = self._newest_first()
        if candidates and self.last not in candidates:
            notes.append(f"{self.last} is gone")
        for path in candidates:
            damage = find_damage(path)
            if not damage:
                return StartingPoint(path, tuple(notes))
            notes.append(f"{path} is damaged: {damage}")
        if not candidates:
            return None
        raise UserError(
            "no checkpoint of this run can be read:\n" + "\n".join(f"  {note}" for note in notes) + "\n"
            "Put a whole one in the place of last.ckpt; or give resume=never overwrite=true to start again, "
            "or another name=<name>"
        )

    def _newest_first(self) -> list[Path]:
        """All checkpoints: last, the one before it, then the others by age."""
        first = [path for path in (self.last, self.previous) if path.is_file()]
        others = {path: path.stat().st_mtime for path in self.checkpoints.glob("*.ckpt") if path not in first}
        return first + sorted(others, key=lambda path: -others[path])

    def begin_at(self, start: StartingPoint) -> None:
        """Let last.ckpt be what the run goes on from: a damaged one must not become the one before the next."""
        if start.path != self.last:
            link_or_copy(start.path, self.last)

    def files(self) -> list[Path]:
        """What a former run left here that a fresh start would mix with its own."""
        names = ("metrics.csv", "config.yaml", "kernels.json", "curves.png", "report.md", "wandb_id.txt")
        beside = (self.root / name for name in names)
        events = (self.root / "tensorboard").glob("events.out.tfevents.*")
        faults = (file for pattern in ("nonfinite_update_*.pt", "hang_rank*.txt") for file in self.root.glob(pattern))
        return [*self.checkpoints.glob("*.ckpt"), *events, *faults, *(file for file in beside if file.exists())]

    def clear(self) -> None:
        """Delete a former run's files; what this project did not write stays."""
        for file in self.files():
            file.unlink()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder if it is not there, keep other processes out of it, and delete halves of files.

        The system lets go of it with the process, however that ends. Where a file system knows no locks, nobody is kept
        out.

        Raises:
            UserError: nothing can be written there, or another process trains there.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = (self.root / ".lock").open("a+")
        except OSError as error:
            raise UserError(
                f"the run's folder {self.root} cannot be written to: {error.strerror}. Give folder=<folder> elsewhere"
            ) from error
        with lock:
            _lock(lock, self.root)
            for half in self.halves():
                half.unlink(missing_ok=True)
            yield

    def halves(self) -> list[Path]:
        """Files that a process was writing, or is."""
        return [half for folder in (self.root, self.checkpoints) for half in folder.glob(".*.part")]

    def write_config(self, values: dict[str, Any]) -> None:
        """Keep the resolved configuration."""
        write_atomically(self.config, OmegaConf.to_yaml(OmegaConf.create(values), sort_keys=False))

    def config_diff(self, values: dict[str, Any]) -> list[str]:
        """Lines "key: old -> new" for what changed since the run's former start; empty if nothing or no former one."""
        if not self.config.exists():
            return []
        try:
            old = _flat(OmegaConf.to_container(OmegaConf.load(self.config)))
        except (YAMLError, OSError, UnicodeDecodeError):
            return [f"{self.config}: cannot be read, so what has changed is not known"]
        new = _flat(values)
        gone = object()
        return [
            f"{key}: {_shown(old.get(key, gone), gone)} -> {_shown(new.get(key, gone), gone)}"
            for key in sorted({*old, *new})
            if old.get(key, gone) != new.get(key, gone)
        ]


def _lock(file: IO[str], root: Path) -> None:
    deadline = time.monotonic() + HOLDER_LEAVES_WITHIN_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                raise UserError(
                    f"another process trains in {root}: {file.read().strip() or 'unknown'}. "
                    "End it first, or give another name=<name>"
                ) from None
            time.sleep(0.2)
        except OSError:
            return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, branch in tree.items()
        for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _shown(value: Any, gone: object) -> str:
    return "(not there)" if value is gone else str(value)
