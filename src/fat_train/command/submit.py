"""submit: the run as a SLURM job, or a sweep as an array of them; looked at here, before it waits in a queue."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fat_train.checkpoint.run_folder import RunFolder
from fat_train.cluster.script import Job, SlurmConfig, hand_in
from fat_train.command.assemble import plan_of, refuse_idle_ranks
from fat_train.command.say import say
from fat_train.config.compose import compose, parse_words
from fat_train.config.resolve import resolve
from fat_train.config.run import Problems, RunConfig, plain, resolve_run
from fat_train.config.sweep import sweep_cells, sweep_place
from fat_train.data.datamodule import DataSource, open_data
from fat_train.types import UserError

OWN = ("slurm", "dry_run")


@dataclass(frozen=True, kw_only=True)
class SubmitSettings:
    """What stands at the root, beside `slurm` and the run's own."""

    dry_run: bool = False
    """Print the script; write and submit nothing."""


def run(words: Sequence[str], extra_dir: Path | None = None, multirun: bool = False) -> None:
    """Write the script into the run's folder and hand it to sbatch; words with several values make an array.

    Args:
        words: the run's, those of `slurm`, and dry_run.
        extra_dir: a folder of the user's own yamls.
        multirun: the words are a sweep's, and are refused where they are not.

    Raises:
        UserError: what `train` would refuse (but the number of GPUs, which only the job's node knows), or sbatch does.
    """
    own = [word for word in words if _root_key(word) in OWN]
    theirs = [word for word in words if _root_key(word) not in OWN]
    several = multirun or any(override.is_sweep_override() for override in parse_words(theirs))
    asked, settings, configs = _look(_runs(theirs, extra_dir) if several else [theirs], own, extra_dir)
    job = _job(configs, theirs, extra_dir, sweep=sweep_place(theirs, extra_dir)[0] if several else None)
    text = job.text(asked, comment=f"Written by: python -m fat_train submit {shlex.join(words)}")
    if settings.dry_run:
        print(text, end="")
        return
    job.folder.mkdir(parents=True, exist_ok=True)
    job.script.write_text(text)
    _announce(job, asked, hand_in(job.script))


def _root_key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0].partition(".")[0]


def _runs(words: Sequence[str], extra_dir: Path | None) -> list[list[str]]:
    """The words of each run of the sweep, in the order of their numbers."""
    _, folder = sweep_place(words, extra_dir)
    return [[*cell.words, f"folder={folder}", f"name={cell.name}"] for cell in sweep_cells(words, extra_dir)]


def _look(
    runs: Sequence[Sequence[str]], own: Sequence[str], extra_dir: Path | None
) -> tuple[SlurmConfig, SubmitSettings, list[RunConfig]]:
    """Type everything, and hold it against the data. A sweep's runs are looked at up to the first with a fault."""
    problems, sources, configs = Problems(), dict[str, DataSource | None](), list[RunConfig]()
    asked: SlurmConfig | None = None
    settings: SubmitSettings | None = None
    for at, words in enumerate(runs):
        values = plain(compose("submit", [*words, *own], extra_dir))
        slurm, dry_run = values.pop("slurm"), values.pop("dry_run")
        if at == 0:
            asked = problems.catch(lambda slurm=slurm: resolve(slurm, where="slurm"))  # type: ignore[misc]
            settings = problems.catch(lambda dry=dry_run: resolve({"dry_run": dry}, SubmitSettings, where=""))  # type: ignore[misc]
        config = _check(values, problems, sources)
        problems.raise_if_any()
        assert config is not None
        configs.append(config)
    assert asked is not None
    assert settings is not None
    margin = configs[0].callback.preemption.margin_s
    if asked.seconds is not None and asked.seconds <= margin:
        raise UserError(
            f"slurm.time={asked.time} is no longer than callback.preemption.margin_s={margin:g} seconds before its end "
            "at which the run leaves: it would be requeued again and again"
        )
    if len({_shape(config) for config in configs}) > 1:
        raise UserError(
            "the tasks of an array have the same nodes and devices: submit a sweep for each value of "
            "trainer.num_nodes, trainer.devices and trainer.accelerator"
        )
    return asked, settings, configs


def _check(values: dict[str, Any], problems: Problems, sources: dict[str, DataSource | None]) -> RunConfig | None:
    """The run's configuration; data sets that have been listed are in `sources`."""
    config = resolve_run(values, problems)
    if config is None:
        return None
    problems.catch(lambda: _refuse_machine(config))
    about_data = repr(config.data)
    if about_data not in sources:
        sources[about_data] = problems.catch(lambda: open_data(config.data))
    source = sources[about_data]
    if source is not None:
        problems.catch(lambda: refuse_idle_ranks(config.trainer, source))
        problems.catch(lambda: plan_of(config, source))
    problems.catch(lambda: RunFolder(config.root).starting_point(config.run.resume, config.run.overwrite))
    return config


def _refuse_machine(config: RunConfig) -> None:
    """What no node can have."""
    if config.trainer.accelerator == "mps":
        raise UserError("trainer.accelerator=mps is no cluster's: leave it out for GPUs, or give cpu")
    if config.trainer.accelerator == "cpu":  # with one device nothing but the precision can be impossible
        dataclasses.replace(config.trainer, devices=1).refuse_impossible()


def _shape(config: RunConfig) -> tuple[int, int, bool]:
    return config.trainer.num_nodes, config.trainer.devices, config.trainer.accelerator != "cpu"


def _job(configs: Sequence[RunConfig], words: Sequence[str], extra_dir: Path | None, sweep: str | None) -> Job:
    first = configs[0]
    nodes, tasks, gpus = _shape(first)
    return Job(
        name=sweep or first.name,
        folder=(first.root if sweep is None else first.root.parent).absolute(),
        directory=Path.cwd(),
        command=[
            sys.executable,
            *("-m", "fat_train"),
            *(["-m"] if sweep else []),
            *(["--config-dir", str(extra_dir.absolute())] if extra_dir else []),
            *words,
        ],
        nodes=nodes,
        tasks_per_node=tasks,
        gpus=gpus,
        cells=len(configs) if sweep else None,
        fresh=first.run.resume == "never",
    )


def _announce(job: Job, asked: SlurmConfig, number: str) -> None:
    runs = "" if job.cells is None else f"{job.cells} runs, each on "
    nodes = f"{job.nodes} node{'s' * (job.nodes > 1)}"
    tasks = f"{job.tasks_per_node} {'GPU' if job.gpus else 'CPU process'}"
    plural = "" if job.tasks_per_node == 1 else "s" if job.gpus else "es"
    limit = f", time limit {asked.time}" if asked.time else ""
    say(f"run            {job.name} in {_from_here(job.folder)}")
    say(f"asks for       {runs}{nodes} with {tasks}{plural}, {asked.cpus_per_task} cores a process{limit}")
    say(f"script         {_from_here(job.script)}")
    say(f"job            {number}")
    log = _from_here(job.log(number))
    say(f"log            {log.replace('%a', '<task>')}")
    say(f"watch          squeue --job={number}; tail -F {shlex.quote(log.replace('%a', '0'))}")
    say(f"cancel         scancel {number}")


def _from_here(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
