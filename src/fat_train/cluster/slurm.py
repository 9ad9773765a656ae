"""The Slurm job that this process belongs to: until when, what state it is in, and putting it back into the queue."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_S = 10
"""Seconds that a program of Slurm is given; its controller may be busy, and a run that must leave cannot wait."""
TRIES = 3
"""Slurm's signals reach all processes of a job: also the program that asks for it, which they end."""
RUNNING = ("RUNNING", "SIGNALING", "STAGE_OUT")
"""What a job shows whose processes live and that nobody has ended; SIGNALING while `--signal` is delivered."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job as its environment tells it. No method raises: a run saves and leaves whatever Slurm answers."""

    id: str
    """What `scontrol` and `squeue` call it: `<array job>_<task>` for a task of an array."""
    array_task: int | None
    """Its number in the array."""
    end_time: float | None
    """When its time limit ends it, in seconds since 1970; None where there is no limit or none is known."""
    restarts: int
    """How often it was requeued before."""

    def state(self) -> str:
        """Slurm's word: RUNNING, COMPLETING (being ended, by whomever), CANCELLED, TIMEOUT …; "" if not known."""
        return _show(self.id).get("JobState", "")

    def requeue(self) -> str:
        """Put the job back into the queue, unless its user has cancelled it or Slurm requeues it already.

        Slurm ends the processes of a job that it requeues, so whatever is to be kept has been saved before.

        Returns:
            "" on success, else why not, in words.
        """
        shown = _show(self.id)
        if not shown:
            return f"Slurm does not answer for job {self.id}"
        if shown["BatchFlag"] != "1":
            return f"job {self.id} is interactive: it has no script to start again"
        if int(shown["Restarts"]) > self.restarts:
            return f"job {self.id} is in the queue again already"
        if shown["JobState"] not in RUNNING and not _ended_by_slurm(shown):
            return f"job {self.id} was cancelled"
        done = _ask("scontrol", "requeue", self.id)
        return "" if done.ok else f"scontrol requeue {self.id}: {done.said}"


def _ended_by_slurm(shown: Mapping[str, str]) -> bool:
    """Whether a job that is being ended is so by its time limit or by a preemption that does not requeue it.

    While its processes are given the time to leave, its state is COMPLETING in these cases as in that of `scancel`.
    """
    return shown["Reason"] == "TimeLimit" or shown.get("PreemptTime", "None") not in ("None", "Unknown")


def this_job(environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """The job that the environment names; None outside one."""
    if "SLURM_JOB_ID" not in environ:
        return None
    job, task = environ["SLURM_JOB_ID"], environ.get("SLURM_ARRAY_TASK_ID")
    if task is not None:
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{task}"
    end = environ.get("SLURM_JOB_END_TIME")  # since Slurm 22.11
    return SlurmJob(
        id=job,
        array_task=None if task is None else int(task),
        end_time=float(end) if end and end.isdecimal() else _end_time(job),
        restarts=int(environ.get("SLURM_RESTART_COUNT", "0")),
    )


@dataclass(frozen=True)
class _Answer:
    ok: bool
    said: str


def _ask(*command: str) -> _Answer:
    # Times by the format that is read below, whatever the user's own.
    environ = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
    try:
        for _ in range(TRIES):
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False, env=environ
            )
            if done.returncode >= 0:
                break
    except FileNotFoundError:
        return _Answer(False, f"{command[0]} is not installed here")
    except subprocess.TimeoutExpired:
        return _Answer(False, f"no answer within {TIMEOUT_S} s")
    except OSError as error:
        return _Answer(False, str(error))
    return _Answer(done.returncode == 0, (done.stdout if done.returncode == 0 else done.stderr).strip())


# Whole lines of `scontrol show job`, so that no job's name or comment is taken for them. The last is not always there.
_LINES = (
    r"^ *(JobState)=(\S+) (Reason)=(\S+)",
    r"^ *(Requeue)=(\d+) (Restarts)=(\d+) (BatchFlag)=(\d+)",
    r"^ *RunTime=\S+ (TimeLimit)=(\S+)",
    r"^ *StartTime=\S+ (EndTime)=(\S+)",
    r"^ *PreemptEligibleTime=\S+ (PreemptTime)=(\S+)",
)


def _show(job: str) -> dict[str, str]:
    """What `scontrol show job` says, of what is read here; nothing where Slurm does not know the job."""
    said = _ask("scontrol", "show", "job", job).said
    found = [re.search(line, said, flags=re.MULTILINE) for line in _LINES]
    if not all(found[:-1]):
        return {}
    words = [word for match in found if match for word in match.groups()]
    return dict(zip(words[::2], words[1::2], strict=True))


def _end_time(job: str) -> float | None:
    shown = _show(job)
    if shown.get("TimeLimit", "UNLIMITED") == "UNLIMITED":
        return None
    try:
        return datetime.fromisoformat(shown["EndTime"]).timestamp()  # local time, as Slurm writes it
    except ValueError:
        return None
