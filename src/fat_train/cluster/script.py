"""A run as a script that `sbatch` takes: what it asks for, its text, and handing it in."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fat_train.types import UserError

SBATCH_TIMEOUT_S = 60
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
OWN = {
    "partition": "slurm.partition", "account": "slurm.account", "qos": "slurm.qos", "constraint": "slurm.constraint",
    "time": "slurm.time", "mem": "slurm.mem", "cpus-per-task": "slurm.cpus_per_task", "signal": "slurm.signal_s",
    "nodes": "trainer.num_nodes", "ntasks-per-node": "trainer.devices", "gpus-per-node": "trainer.devices",
    "job-name": "name", "array": "slurm.array_parallel",
}  # fmt: skip
"""Options that a setting stands for; `slurm.extra` would say them a second time."""


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """What a job asks Slurm for; None leaves it to the cluster."""

    partition: str | None = None
    """Queue, or several with commas between."""
    account: str | None = None
    """Who pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that nodes must have."""
    time: str | None = None
    """Time limit: minutes, 24:00:00 or 2-00:00:00. A run that takes longer is requeued, and goes on."""
    mem: str | None = None
    """Memory of a node: 200G; 0 takes all."""
    cpus_per_task: int = 12
    """Cores of each process; most of them decode images."""
    signal_s: int = 120
    """Seconds before the time limit at which Slurm tells the run to save and leave; 0 for no signal."""
    array_parallel: int = 0
    """Runs of a sweep at one time; 0 sets no limit."""
    setup: str = ""
    """Shell before the run, of one line or several: module load cuda."""
    extra: str = ""
    """Other options of sbatch: --exclusive --reservation=mine."""

    def __post_init__(self) -> None:
        if self.time is not None and not TIME.fullmatch(self.time):
            raise UserError(f"slurm.time must be minutes, HH:MM:SS or D-HH:MM:SS; got {self.time}")
        if self.cpus_per_task < 1:
            raise UserError(f"slurm.cpus_per_task must be at least 1; got {self.cpus_per_task}")
        for name in ("signal_s", "array_parallel"):
            if getattr(self, name) < 0:
                raise UserError(f"slurm.{name} must not be negative; got {getattr(self, name)}")
        if self.signal_s > 65535:
            raise UserError(f"slurm.signal_s must be at most 65535, Slurm's own limit; got {self.signal_s}")
        for option in self.options:
            name = option.lstrip("-").partition("=")[0]
            if not option.startswith("--"):
                raise UserError(f"slurm.extra must be options as --name or --name=value; got {option}")
            if name in OWN:
                raise UserError(f"slurm.extra: give --{name} as {OWN[name]}=<value>")
        for name in ("partition", "account", "qos", "constraint", "mem"):
            if "\n" in (getattr(self, name) or ""):
                raise UserError(f"slurm.{name} must be one line; got {getattr(self, name)!r}")

    @property
    def seconds(self) -> int | None:
        """The time limit. Its first number is minutes, but hours after days or where there are three."""
        found = None if self.time is None else TIME.fullmatch(self.time)
        if found is None:
            return None
        days, *rest = (None if group is None else int(group) for group in found.groups())
        hours, minutes, seconds = rest if days is not None or rest[2] is not None else [0, *rest[:2]]
        return ((24 * (days or 0) + (hours or 0)) * 60 + (minutes or 0)) * 60 + (seconds or 0)

    @property
    def options(self) -> list[str]:
        """Those of `extra`, one by one."""
        try:
            return shlex.split(self.extra)
        except ValueError as error:
            raise UserError(f"slurm.extra={self.extra}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run, or a sweep's runs, as Slurm starts them."""

    name: str
    """Of the job: two jobs of one name wait for each other, as they would write into one folder."""
    folder: Path
    """Absolute; where script and logs are."""
    directory: Path
    """Where it runs."""
    command: Sequence[str]
    """What each process is, word by word."""
    nodes: int
    tasks_per_node: int
    gpus: bool
    cells: int | None
    """Runs of a sweep; None for a single run."""
    fresh: bool
    """Whether the words say resume=never: a requeued job is the same words again, and must go on all the same."""

    @property
    def script(self) -> Path:
        """The file that sbatch gets."""
        return self.folder / "submit.sbatch"

    def log(self, number: str) -> Path:
        """Where the output of the job with this number goes; "%A" and the like are Slurm's to fill in."""
        return self.folder / f"slurm-{number}{'' if self.cells is None else '_%a'}.out"

    def text(self, config: SlurmConfig, comment: str) -> str:
        """The script."""
        limit = f"%{config.array_parallel}" if config.array_parallel else ""
        options: dict[str, object] = {
            "job-name": self.name,
            "array": None if self.cells is None else f"0-{self.cells - 1}{limit}",
            "partition": config.partition,
            "account": config.account,
            "qos": config.qos,
            "constraint": config.constraint,
            "time": config.time,
            "nodes": self.nodes,
            "ntasks-per-node": self.tasks_per_node,
            "gpus-per-node": self.tasks_per_node if self.gpus else None,
            "cpus-per-task": config.cpus_per_task,
            "mem": config.mem,
            "signal": f"USR1@{config.signal_s}" if config.signal_s else None,
            "output": self.log("%j" if self.cells is None else "%A"),
            "chdir": self.directory,
        }
        lines = [_option(f"{name}={value}") for name, value in options.items() if value is not None]
        lines += [_option(option) for option in ("requeue", "open-mode=append", "dependency=singleton")]
        lines += [_option(option) for option in config.options]
        srun = ["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={config.cpus_per_task}", *self.command]
        task = [] if self.cells is None else ['--cell "$SLURM_ARRAY_TASK_ID"']
        again = ["${SLURM_RESTART_COUNT:+resume=auto}"] if self.fresh else []
        run = f"exec {' '.join([shlex.join(srun), *task, *again])}"
        about = [f"# {line}" for line in comment.splitlines()]
        return "\n".join(
            ["#!/usr/bin/env bash", *about, *lines, "set -eo pipefail", *config.setup.splitlines(), run, ""]
        )


def _option(option: str) -> str:
    name, equals, value = option.lstrip("-").partition("=")
    # sbatch reads quotes as a shell does, and folders may have blanks in their names.
    return f"#SBATCH --{name}{equals}{shlex.quote(value) if value else ''}"


def hand_in(script: Path) -> str:
    """Submit; the job's number.

    Raises:
        UserError: no sbatch here, or sbatch refuses, in its own words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            capture_output=True, text=True, errors="replace", timeout=SBATCH_TIMEOUT_S, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UserError(
            "sbatch is not installed here: submit from a login node of the cluster; dry_run=true shows the script"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"sbatch did not answer within {SBATCH_TIMEOUT_S} s; look with squeue --me whether {script} is queued"
        ) from error
    if done.returncode:
        raise UserError(f"sbatch refuses {script}:\n{done.stderr.strip()}")
    return done.stdout.strip().partition(";")[0]  # "number;cluster" where there are several
