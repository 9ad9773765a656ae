"""What a job asks of Slurm and when it goes back into the queue, by the answers of a real Slurm."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fat_train.cluster import slurm as module
from fat_train.cluster.slurm import this_job
from real_slurm import Slurm, cancel_all

# Writes what its job is; on the first signal tries to requeue it, writes what came of that, and leaves as a run does.
PROBE = f"""
import importlib.util, json, signal, sys, time
spec = importlib.util.spec_from_file_location("slurm", {module.__file__!r})  # alone: all of fat_train takes seconds
slurm = sys.modules["slurm"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slurm)
job, told = slurm.this_job(), []
for one in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(one, lambda number, frame: told.append(number))
def write(**facts):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(dict(facts, id=job.id, restarts=job.restarts)) + "\\n")
write(at="start", state=job.state(), end=job.end_time, task=job.array_task)
while not told:
    time.sleep(0.05)
write(at="end", told=told[0], requeue=job.requeue(), again=job.requeue())
sys.exit(75)
"""


class Probe:
    """Jobs that run the program above, and what they wrote."""

    def __init__(self, slurm: Slurm, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "probe.py").write_text(PROBE)

    def command(self) -> str:
        return f"srun --ntasks=1 python3 {self.folder}/probe.py {self.folder}/said"

    def submit(self, *words: str) -> str:
        output = f"--output={self.folder}/job.out"
        return self.slurm.submit(*words, "--open-mode=append", output, f"--wrap=exec {self.command()}")

    def said(self) -> list[dict[str, Any]]:
        said = self.folder / "said"
        return [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []

    def after(self, count: int) -> list[dict[str, Any]]:
        """What was written, once it is so many lines."""
        self.slurm.until(lambda: "yes" if len(self.said()) >= count else "", what=f"{count} lines of the job")
        return self.said()


@pytest.fixture
def probe(slurm: Slurm, tmp_path: Path) -> Iterator[Probe]:
    yield Probe(slurm, tmp_path)
    cancel_all(slurm)  # a job that a failed test leaves would be in the next one's way


def test_outside_a_job_there_is_none() -> None:
    assert this_job({}) is None


def test_the_environment_alone_tells_what_it_can() -> None:
    environ = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job = this_job({**environ, "SLURM_JOB_END_TIME": "1800000000", "SLURM_RESTART_COUNT": "3"})
    assert job is not None
    assert (job.id, job.array_task, job.end_time, job.restarts) == ("7_2", 2, 1.8e9, 3)


def test_where_slurm_does_not_answer_nothing_is_known_and_nothing_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    job = this_job({"SLURM_JOB_ID": "1"})
    assert job is not None
    assert (job.end_time, job.state(), job.requeue()) == (None, "", "Slurm does not answer for job 1")


def test_a_silent_slurm_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(module, "TIMEOUT_S", 0.1)
    job = this_job({"SLURM_JOB_ID": "1"})
    assert job is not None
    assert job.requeue() == "Slurm does not answer for job 1"


def test_a_running_job_knows_when_its_time_is_up(probe: Probe) -> None:
    job = probe.submit("--time=90", "--array=3")
    (start,) = probe.after(1)
    assert (start["id"], start["task"], start["state"]) == (f"{job}_3", 3, "RUNNING")
    assert start["end"] - time.time() == pytest.approx(90 * 60, abs=120)
    probe.slurm.ask("scancel", job)


def test_a_job_that_is_only_told_to_leave_goes_back_into_the_queue_once(probe: Probe) -> None:
    """`scancel --signal` leaves the job itself alone, as `sbatch --signal` and preemption's grace time do."""
    job = probe.submit("--job-name=JobState=CANCELLED Reason=None")
    probe.after(1)
    probe.slurm.ask("scancel", "--signal=TERM", job)
    _, end, second = probe.after(3)
    assert end["requeue"] == ""
    # Slurm may end the program that asks together with the job that it asks for.
    assert end["again"] in (f"job {job} is in the queue again already", f"Slurm does not answer for job {job}")
    assert (second["at"], second["restarts"], second["id"]) == ("start", 1, job)
    probe.slurm.ask("scancel", job)
    *_, end = probe.after(4)
    assert (end["at"], end["requeue"]) == ("end", f"job {job} was cancelled")
    assert probe.slurm.wait(job) == "CANCELLED"


def test_a_task_of_an_array_goes_back_alone(probe: Probe) -> None:
    job = probe.submit("--array=1-2")
    probe.after(2)
    probe.slurm.ask("scancel", "--signal=USR1", f"{job}_2")
    *_, end, second = probe.after(4)
    assert (end["id"], end["requeue"], second["id"], second["restarts"]) == (f"{job}_2", "", f"{job}_2", 1)
    assert probe.slurm.show(f"{job}_1")["Restarts"] == "0"
    probe.slurm.ask("scancel", job)


def test_a_job_that_its_user_cancelled_stays_cancelled(probe: Probe) -> None:
    job = probe.submit()
    probe.after(1)
    probe.slurm.ask("scancel", job)
    assert probe.after(2)[1]["requeue"] == f"job {job} was cancelled"
    assert probe.slurm.wait(job) == "CANCELLED"
    assert probe.slurm.show(job)["Restarts"] == "0"


def test_a_job_that_somebody_requeues_is_left_to_slurm(probe: Probe) -> None:
    job = probe.submit()
    probe.after(1)
    probe.slurm.ask("scontrol", "requeue", job)
    _, end, second = probe.after(3)
    assert end["requeue"] == f"job {job} is in the queue again already"
    assert second["restarts"] == 1
    assert probe.slurm.show(job)["Restarts"] == "1"
    probe.slurm.ask("scancel", job)


def test_a_job_that_has_to_make_room_goes_back_where_slurm_would_cancel_it(probe: Probe) -> None:
    job = probe.submit("--partition=spare", "--nodelist=node0")
    probe.after(1)
    urgent = probe.slurm.submit("--nodelist=node0", "--exclusive", "--output=/dev/null", "--wrap=true")
    _, end, second = probe.after(3)
    assert (end["requeue"], second["restarts"]) == ("", 1)
    assert probe.slurm.wait(urgent) == "COMPLETED"
    probe.slurm.ask("scancel", job)


def test_a_job_that_may_not_be_requeued_says_so_in_slurms_words(probe: Probe) -> None:
    job = probe.submit("--no-requeue")
    probe.after(1)
    probe.slurm.ask("scancel", "--signal=TERM", job)
    said = probe.after(2)[1]["requeue"]
    assert re.match(rf"scontrol requeue {job}: .*disabled", said, flags=re.DOTALL)
    assert probe.slurm.wait(job) == "FAILED"


def test_an_interactive_job_is_not_requeued(probe: Probe) -> None:
    shell = (
        f"{probe.command()} & until [ -e {probe.folder}/said ]; do sleep 0.1; done; scancel -s TERM $SLURM_JOB_ID; wait"
    )
    probe.slurm.ask("salloc", "--ntasks=1", "bash", "-c", shell)
    end = probe.after(2)[1]
    assert end["requeue"] == f"job {end['id']} is interactive: it has no script to start again"


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_back_into_the_queue(probe: Probe) -> None:
    """Slurm itself would leave it ended; it looks for such jobs twice a minute."""
    job = probe.submit("--time=1")
    _, end, second = probe.after(3)
    assert (end["requeue"], second["restarts"]) == ("", 1)
    probe.slurm.ask("scancel", job)
