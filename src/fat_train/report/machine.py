"""What this machine is, and how many hours a run would take on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.table import Table

from fat_train.metric.record import format_duration

CGROUP = Path("/sys/fs/cgroup")
SLURM_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_PARTITION",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_GPUS_ON_NODE",
    "SLURM_PROCID",
    "SLURM_RESTART_COUNT",
)


def machine_facts(run_dir: Path, data_root: Path | None = None) -> dict[str, str]:
    """What is known of this machine, a name a fact, ready to print or to keep as JSON.

    Args:
        run_dir: where runs are written; it need not be there yet.
        data_root: where the images lie, if anywhere.
    """
    facts = {
        "host": platform.node(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "DALI": _dali_version() or "not installed",
        "CPU cores": _cores(),
        "memory": _memory(),
    }
    devices = range(torch.cuda.device_count())
    for device in devices:
        properties = torch.cuda.get_device_properties(device)
        facts[f"GPU {device}"] = f"{properties.name}, {_gib(properties.total_memory)}"
    if not devices:
        facts["GPU"] = "none"
    facts["disk for runs"] = _disk(run_dir)
    if data_root is not None:
        facts["disk of the data"] = _disk(data_root)
    facts |= {name: os.environ[name] for name in SLURM_VARIABLES if name in os.environ}
    return facts


def machine_table(facts: Mapping[str, str]) -> Table:
    """The facts for a terminal."""
    table = Table(title="Machine", title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def estimate(images_per_s: float, images: int, epochs: int) -> str:
    """How long a run would take at a measured rate, as a sentence with its arithmetic.

    Args:
        images_per_s: of the whole job.
        images: of one epoch.
        epochs: of the run.
    """
    seconds = images * epochs / images_per_s
    return (
        f"{epochs} epochs × {images:,} images at {images_per_s:,.0f} images/s take {seconds / 3600:,.1f} hours "
        f"({format_duration(seconds)}), validation not counted"
    )


def _dali_version() -> str | None:
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"] or ""
        if name.lower().replace("_", "-").startswith("nvidia-dali"):
            return f"{package.version} ({name})"
    return None


def _cores() -> str:
    present = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else present
    text = f"{usable} usable of {present}"
    limit = _cgroup_cores()
    return text if limit is None else f"{text}, a limit of {limit:g} is set (cgroup)"


def _cgroup_cores() -> float | None:
    """Cores' worth of time that the control group grants; None without a limit."""
    modern = CGROUP / "cpu.max"
    if modern.is_file():
        quota, period = modern.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    quota_file, period_file = CGROUP / "cpu" / "cpu.cfs_quota_us", CGROUP / "cpu" / "cpu.cfs_period_us"
    if quota_file.is_file() and int(quota_file.read_text()) > 0:
        return int(quota_file.read_text()) / int(period_file.read_text())
    return None


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit_file in (CGROUP / "memory.max", CGROUP / "memory" / "memory.limit_in_bytes"):
        if limit_file.is_file() and (limit := limit_file.read_text().strip()).isdecimal() and int(limit) < total:
            return f"{_gib(int(limit))} of {_gib(total)} (cgroup)"
    return _gib(total)


def _disk(path: Path) -> str:
    there = next(parent for parent in (path.resolve(), *path.resolve().parents) if parent.exists())
    usage = shutil.disk_usage(there)
    return f"{_gib(usage.free)} free of {_gib(usage.total)} ({there})"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
