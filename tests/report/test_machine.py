from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fat_train.report import machine
from fat_train.report.machine import estimate, machine_facts, machine_table


def test_facts_name_versions_cores_memory_and_disk(tmp_path: Path) -> None:
    facts = machine_facts(tmp_path / "runs" / "not-yet-there", tmp_path)
    assert torch.__version__ in facts["torch"]
    assert re.match(rf"[1-9]\d* usable of {os.cpu_count()}", facts["CPU cores"])
    assert facts["memory"].split()[1] == "GiB"
    assert str(tmp_path) in facts["disk for runs"]
    assert "not-yet-there" not in facts["disk for runs"]
    assert "GiB free of" in facts["disk of the data"]
    assert json.loads(json.dumps(facts)) == facts


def test_gpus_are_named_or_said_to_be_missing() -> None:
    facts = machine_facts(Path())
    assert ("GPU 0" in facts) == torch.cuda.is_available()
    assert ("GPU" in facts) != torch.cuda.is_available()
    assert "disk of the data" not in facts


def test_a_slurm_job_shows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    assert machine_facts(Path())["SLURM_JOB_ID"] == "4711"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "SLURM_JOB_ID" not in machine_facts(Path())


@pytest.mark.parametrize(("content", "said"), [("150000 100000", "a limit of 1.5 is set"), ("max 100000", "")])
def test_a_containers_limits_are_seen(content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text(content + "\n")
    (tmp_path / "memory.max").write_text(f"{2**30}\n" if said else "max\n")
    facts = machine_facts(Path())
    assert said in facts["CPU cores"]
    assert ("limit" in facts["CPU cores"]) == bool(said)
    assert facts["memory"].startswith("1.0 GiB of ") == bool(said)


def test_the_table_shows_every_fact() -> None:
    console = Console(file=io.StringIO(), width=200)
    facts = machine_facts(Path())
    console.print(machine_table(facts))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for name, value in facts.items():
        assert name in text
        assert value in text


def test_the_estimate_shows_its_arithmetic() -> None:
    assert estimate(2500.0, 1_281_167, 300) == (
        "300 epochs × 1,281,167 images at 2,500 images/s take 42.7 hours (1 d 19 h), validation not counted"
    )
