"""What submit asks Slurm for, and what it refuses before anything waits in a queue."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fat_train.__main__ import main
from fat_train.cluster.script import SlurmConfig
from fat_train.config.sweep import sweep_cells

Capture = pytest.CaptureFixture[str]


def options(script: str) -> dict[str, str]:
    """The script's #SBATCH lines."""
    lines = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, flags=re.MULTILINE)
    return {name: " ".join(shlex.split(value)) for name, value in lines}


def dry(capsys: Capture, *words: str) -> str:
    assert main(["submit", *words, "dry_run=true"]) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_the_script_and_writes_nothing(tiny: list[str], tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "runs"
    script = dry(capsys, *tiny, f"folder={folder}", "slurm.partition=gpu", "slurm.time=24:00:00", "trainer.devices=4")
    asked = options(script)
    assert (asked["partition"], asked["time"], asked["nodes"]) == ("gpu", "24:00:00", "1")
    assert (asked["ntasks-per-node"], asked["gpus-per-node"], asked["signal"]) == ("4", "4", "USR1@120")
    assert asked["job-name"] == "fat_nano_synthetic"
    assert asked["output"] == f"{folder}/fat_nano_synthetic/slurm-%j.out"
    assert {"requeue", "open-mode"} <= asked.keys()
    assert not {"mem", "account", "qos", "constraint", "array"} & asked.keys()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert not folder.exists()


def test_the_job_trains_by_the_words_that_were_given(tiny: list[str], capsys: Capture) -> None:
    script = dry(capsys, *tiny, "name=it", "folder=a b", "slurm.signal_s=0", "slurm.cpus_per_task=3", "slurm.mem=9G")
    *srun, last = shlex.split(script.splitlines()[-1])
    assert srun[:4] == ["exec", "srun", "--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert [*srun[4:], last] == [sys.executable, "-m", "fat_train", *tiny, "name=it", "folder=a b"]
    assert options(script)["mem"] == "9G"
    assert "signal" not in options(script)


def test_a_run_on_cpus_asks_for_no_gpus(tiny: list[str], capsys: Capture) -> None:
    asked = options(dry(capsys, *tiny, "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=2"))
    assert (asked["nodes"], asked["ntasks-per-node"]) == ("2", "2")
    assert "gpus-per-node" not in asked


@pytest.mark.parametrize("before", [[], ["-m"]])
def test_words_with_several_values_become_an_array(
    before: list[str], tiny: list[str], tmp_path: Path, capsys: Capture
) -> None:
    words = [*tiny, f"folder={tmp_path}", "name=rates", "model.drop_path_rate=0,0.1,0.2", "seed=0,1"]
    script = dry(capsys, *before, *words, "slurm.array_parallel=2")
    asked = options(script)
    assert asked["array"] == f"0-{len(sweep_cells(words)) - 1}%2" == "0-5%2"
    assert asked["output"] == f"{tmp_path}/rates/slurm-%A_%a.out"
    run = shlex.split(script.splitlines()[-1])
    assert run[-2:] == ["--cell", "$SLURM_ARRAY_TASK_ID"]
    assert run[run.index("fat_train") + 1 : -2] == ["-m", *words]


def test_a_requeued_run_that_was_to_start_afresh_goes_on(tiny: list[str], capsys: Capture) -> None:
    assert "resume=auto" not in dry(capsys, *tiny)
    last = dry(capsys, *tiny, "resume=never").splitlines()[-1]
    again = "set -- " + last[last.index("resume=never") :] + '; echo "$@"'
    for count, words in (("", "resume=never"), ("SLURM_RESTART_COUNT=1; ", "resume=never resume=auto")):
        done = subprocess.run(["bash", "-c", count + again], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == words


def test_a_clusters_own_values_come_from_a_yaml_of_the_user(tiny: list[str], tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "ours.yaml").write_text(
        "defaults: [default]\naccount: me\nextra: --exclusive --comment='a b'\n"
        "setup: |\n  module load a\n  export B='c d'\n"
    )
    script = dry(capsys, *tiny, "--config-dir", str(tmp_path), "slurm=ours")
    assert (options(script)["account"], options(script)["comment"]) == ("me", "a b")
    assert "exclusive" in options(script)
    assert script.index("\nset -eo pipefail\nmodule load a\nexport B='c d'\nexec srun ") > 0
    assert f"--config-dir {tmp_path}" in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["slurm.partion=x"], "unknown key slurm.partion; did you mean partition"),
        (["slurm=mine"], "slurm=mine: no such choice"),
        (["slurm.time=3h"], "slurm.time must be minutes, HH:MM:SS or D-HH:MM:SS; got 3h"),
        (["slurm.time=2"], "slurm.time=2 is no longer than callback.preemption.margin_s=120"),
        (["slurm.cpus_per_task=0"], "slurm.cpus_per_task must be at least 1; got 0"),
        (["slurm.signal_s=-1"], "slurm.signal_s must not be negative; got -1"),
        (["slurm.signal_s=70000"], "slurm.signal_s must be at most 65535"),
        (["slurm.extra=--mem=3"], "slurm.extra: give --mem as slurm.mem=<value>"),
        (["slurm.extra=exclusive"], "must be options as --name or --name=value; got exclusive"),
        (["slurm.extra=--comment='a"], "No closing quotation"),
        (["dry_run=perhaps"], "dry_run must be bool"),
        (["trainer.accelerator=mps"], "trainer.accelerator=mps is no cluster's"),
        (["trainer.accelerator=cpu", "trainer.precision=16-mixed"], "16-mixed needs a GPU"),
        (["trainer.devices=17"], "the validation set has 16 images, fewer than the 17 processes"),
        (["trainer.devices=3"], "global_batch"),
        (["model.drop_path_rate=2", "slurm.time=x"], "2 things to mend first"),
        (["trainer.devices=1,2"], "the tasks of an array have the same nodes and devices"),
        (["-m"], "no word has several"),
        (["data=imagenet", "data.root=/nowhere/at/all"], "data.root=/nowhere/at/all is not there"),
    ],
)
def test_what_train_would_refuse_is_refused_before_the_queue(
    words: list[str], said: str, tiny: list[str], tmp_path: Path, capsys: Capture
) -> None:
    if "data=imagenet" in words:
        tiny = []
    assert main(["submit", *tiny, f"folder={tmp_path}", *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_machine_without_sbatch_is_told_of_dry_run(
    tiny: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", *tiny, f"folder={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert "sbatch is not installed here" in error
    assert "dry_run=true" in error


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:00:30", 3630), ("2-0", 172800), ("1-2:30", 95400), ("1-2:30:05", 95405)],
)
def test_a_time_limit_means_what_slurm_means_by_it(time: str, seconds: int) -> None:
    assert SlurmConfig(time=time).seconds == seconds
