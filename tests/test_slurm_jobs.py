"""Training as jobs of a real Slurm: what ends a job, and that the run does not mind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fat_train.__main__ import main
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.metric.record import read_rows
from real_slurm import Slurm

SCRIPTS = Path(__file__).parents[1] / "slurm"
ON_CPU = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
DIGITS = ["experiment=digits", "schedule.epochs=3", "schedule.warmup_epochs=1", "data.num_workers=1"]
RATES = "0,0.05,0.1,0.2"


@pytest.fixture
def site(slurm: Slurm, digits_cache: Path) -> dict[str, str]:
    """What a user exports before the first job."""
    return {"FAT_TRAIN_PYTHON": sys.executable, "FAT_TRAIN_PRECISION": "32", "FAT_TRAIN_CACHE": str(digits_cache)}


def in_slurm(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process talks to it, as a shell on its login node does."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environ[name])


def finished(slurm: Slurm, job: str, log: Path, timeout_s: float = 400) -> str:
    """Wait for the job's good end; its log."""
    state = slurm.wait(job, timeout_s=timeout_s)
    text = log.read_text() if log.exists() else "(no log)"
    assert (state, slurm.show(job)["ExitCode"]) == ("COMPLETED", "0:0"), text
    return text


def epochs_begun(run: Path) -> int:
    """Rows that the run has written."""
    with suppress(OSError):
        return len(read_rows(run / "metrics.csv"))
    return 0


def same_weights(one: Path, other: Path) -> bool:
    a, b = (read_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_script_trains_on_two_nodes(slurm: Slurm, site: dict[str, str], tiny: list[str], tmp_path: Path) -> None:
    output = f"--output={tmp_path}/log"
    # The names of these nodes are known to Slurm alone; a cluster's are known to its network.
    environ = {**site, "MASTER_ADDR": "127.0.0.1"}
    words = [*tiny, f"folder={tmp_path}", "name=two", "schedule.epochs=1"]
    job = slurm.submit("--nodes=2", *ON_CPU, output, str(SCRIPTS / "train.sbatch"), *words, environ=environ)
    log = finished(slurm, job, tmp_path / "log")
    assert "4 images x 2 devices" in log
    assert log.count("epoch 1/1 · train/loss") == 1
    assert epochs_begun(tmp_path / "two")


def test_submit_makes_an_array_whose_tasks_train_one_run_each(
    slurm: Slurm,
    site: dict[str, str],
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_slurm(slurm, monkeypatch)
    words = [*tiny, f"folder={tmp_path}/my runs", "name=rates", "schedule.epochs=1", "trainer.accelerator=cpu"]
    asks = ["slurm.cpus_per_task=1", "slurm.time=5", "slurm.extra=--comment='a b'"]
    assert main(["submit", *words, "model.drop_path_rate=0,0.1", *asks]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["cancel"] == f"scancel {said['job']}"
    folder = tmp_path / "my runs" / "rates"
    assert slurm.show(f"{said['job']}_1")["Comment"] == "a"  # and a blank, where this reading ends
    for task, cell in enumerate(("drop_path_rate=0", "drop_path_rate=0.1")):
        log = Path(said["log"].replace("<task>", str(task)))
        assert "epoch 1/1" in finished(slurm, f"{said['job']}_{task}", log)
        assert epochs_begun(folder / cell)
    assert (folder / "submit.sbatch").is_file()


def test_a_second_job_of_a_run_waits_for_the_first(
    slurm: Slurm, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(slurm, monkeypatch)
    jobs = []
    for setup in ("sleep 600", "true"):
        words = [*tiny, f"folder={tmp_path}", "trainer.accelerator=cpu", "slurm.cpus_per_task=1"]
        assert main(["submit", *words, f"slurm.setup={setup}"]) == 0
        jobs.append(dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())["job"])
        slurm.wait(jobs[0], "RUNNING")
    slurm.until(lambda: (slurm.show(jobs[1])["Reason"] == "Dependency" and "yes") or "", what="the second to wait")
    slurm.ask("scancel", *jobs)


def test_what_sbatch_refuses_is_said_in_its_words(
    slurm: Slurm, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_slurm(slurm, monkeypatch)
    words = [*tiny, f"folder={tmp_path}", "trainer.accelerator=cpu", "slurm.partition=nowhere"]
    assert main(["submit", *words]) == 2
    error = capsys.readouterr().err
    assert f"sbatch refuses {tmp_path}/fat_nano_synthetic/submit.sbatch" in error
    assert "invalid partition specified" in error


@pytest.mark.slow
def test_a_requeued_job_ends_with_the_weights_of_an_unbroken_run(
    slurm: Slurm, site: dict[str, str], tmp_path: Path
) -> None:
    words = [*DIGITS, "trainer.log_every_n_steps=1"]
    assert main([*words, f"folder={tmp_path}/unbroken"]) == 0
    output = f"--output={tmp_path}/log"
    script = str(SCRIPTS / "train.sbatch")
    job = slurm.submit(*ON_CPU, output, script, *words, "resume=never", f"folder={tmp_path}/jobs", environ=site)
    run = tmp_path / "jobs" / "fat_nano_digits"
    slurm.until(lambda: "yes" if epochs_begun(run) > 30 else "", what="the second epoch")
    slurm.ask("scontrol", "requeue", job)
    log = finished(slurm, job, tmp_path / "log")
    assert slurm.show(job)["Restarts"] == "1"
    assert "resuming" in log
    assert same_weights(run, tmp_path / "unbroken" / "fat_nano_digits")


@pytest.mark.slow
def test_an_array_whose_tasks_are_broken_off_in_every_way_ends_as_the_unbroken_sweep(
    slurm: Slurm, site: dict[str, str], tmp_path: Path
) -> None:
    """Four runs: one is requeued, one reaches its time limit, one gets SIGTERM, one is left alone."""
    script, log = str(SCRIPTS / "sweep_drop_path.sbatch"), f"{tmp_path}/log-%a"
    words = [*DIGITS, "trainer.log_every_n_steps=1"]
    array = ["--array=0-3", f"--output={log}", "--signal=USR1@0", "--time=60"]
    job = slurm.submit(
        *ON_CPU, *array, script, *words, f"folder={tmp_path}/jobs", environ={**site, "FAT_TRAIN_RATES": RATES}
    )
    runs = [tmp_path / "jobs" / "drop_path" / f"drop_path_rate={rate}" for rate in RATES.split(",")]
    breaks: dict[int, Callable[[], object]] = {
        0: lambda: slurm.ask("scontrol", "requeue", f"{job}_0"),
        2: lambda: slurm.ask("scancel", "--signal=TERM", f"{job}_2"),
        1: lambda: reach_time_limit(slurm, f"{job}_1"),  # the last: it waits
    }
    for task, break_off in breaks.items():
        slurm.until(lambda task=task: "yes" if epochs_begun(runs[task]) > 5 else "", what=f"task {task} to train")
        break_off()
    for task in range(4):
        finished(slurm, f"{job}_{task}", Path(log.replace("%a", str(task))))
    assert [slurm.show(f"{job}_{task}")["Restarts"] for task in range(4)] == ["1", "1", "1", "0"]

    sweep = ["-m", *words, "name=drop_path", f"model.drop_path_rate={RATES}", f"folder={tmp_path}/here"]
    assert main(sweep) == 0
    for run in runs:
        assert same_weights(run, tmp_path / "here" / "drop_path" / run.name)


def reach_time_limit(slurm: Slurm, job: str) -> None:
    """Stand still, as on a disk that hangs, until Slurm finds the time up; it wakes the processes by SIGCONT itself."""
    pids = processes_of(slurm.show(job)["JobId"], slurm)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    slurm.until(lambda: "yes" if slurm.show(job)["Restarts"] == "1" else "", what="the time limit")
    slurm.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def processes_of(job_id: str, slurm: Slurm) -> list[int]:
    """The job's Pythons, by their environments."""
    marks = (f"SLURM_JOB_ID={job_id}".encode(), f"SLURM_CONF={slurm.environ['SLURM_CONF']}".encode())
    pids = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            of_job = set(marks) <= set(environ.read_bytes().split(b"\0"))
            if of_job and b"fat_train" in (environ.parent / "cmdline").read_bytes().split(b"\0"):
                pids.append(int(environ.parent.name))
    return pids
