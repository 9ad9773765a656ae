"""benchmark checkpoint: how long a training stands still for a checkpoint, and what that costs it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytorch_lightning as pl
from omegaconf import DictConfig

from fat_train.benchmark.checkpoint import BlockClock, Seconds, TimedCheckpoints, TimedIO, lines_of
from fat_train.callback.checkpoint import Checkpoints
from fat_train.callback.preemption import LeaveRequest
from fat_train.checkpoint.io import write_atomically
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.command.assemble import build_training, open_run, path_of_out, plan_of, split_settings
from fat_train.command.say import say
from fat_train.config.run import RunConfig, plain
from fat_train.data.datamodule import DataSource
from fat_train.report.machine import machine_facts
from fat_train.trainer.build import build_trainer
from fat_train.trainer.plan import RunPlan
from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class CheckpointBenchmarkSettings:
    """What `conf/benchmark_checkpoint.yaml` adds to a run's configuration."""

    updates: int = 200
    """Updates that are timed with saving, and as many without."""
    every: int = 20
    """Updates of a block."""
    out: str = "runs/benchmark_checkpoint.json"
    """Where the numbers are kept."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.updates < 2 * self.every:
            raise UserError(
                f"every must be at least 1 and updates at least twice as many; got {self.every} and {self.updates}"
            )


def run(tree: DictConfig) -> Seconds:
    """Train for a while and tell; the run's own folder is deleted, the numbers are kept.

    Raises:
        UserError: a wrong setting, or several devices: the pause is rank 0's.
    """
    settings, values = split_settings(plain(tree), CheckpointBenchmarkSettings)
    out = path_of_out(settings.out, ".json")
    config, source = open_run(values)
    if config.trainer.devices * config.trainer.num_nodes > 1:
        raise UserError("benchmark checkpoint runs on one device: give trainer.devices=1")
    updates = settings.every * (1 + 2 * (settings.updates // settings.every))
    plan = plan_of(config, source)
    if plan.steps_per_epoch < updates:
        raise UserError(
            f"updates={settings.updates} need an epoch of {updates}, as many again without saving; this one has "
            f"{plan.steps_per_epoch} updates: give fewer, or a smaller trainer.global_batch"
        )
    parent = Path(config.run.folder).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(tempfile.mkdtemp(prefix=".benchmark_checkpoint.", dir=parent)))
    seconds = Seconds()
    try:
        size_mb = _train(settings.every, updates, config, source, plan, folder, seconds)
    finally:
        shutil.rmtree(folder.root)
    facts = machine_facts(parent)
    machine = f"{facts['CPU cores']} cores, {facts['memory']}, torch {facts['torch']}"
    say(f"machine        {machine}; disk: {facts['disk for runs']}")
    lines = lines_of(seconds, settings.every, size_mb)
    for line in lines:
        say(line)
    write_atomically(out, json.dumps({"machine": facts, "lines": lines, "seconds": asdict(seconds)}, indent=1))
    say(f"details        {out}")
    return seconds


def _train(
    every: int,
    updates: int,
    config: RunConfig,
    source: DataSource,
    plan: RunPlan,
    folder: RunFolder,
    seconds: Seconds,
) -> float:
    """The part of an epoch that is timed; returns the size of a checkpoint in MB."""
    pl.seed_everything(config.run.seed, verbose=False)
    module, loaders = build_training(config, source, plan, provenance={})
    with LeaveRequest(config.callback.preemption) as request:
        saver = TimedCheckpoints(
            replace(config.callback.checkpoint, top_k=0, every_n_epochs=0, every_n_minutes=0, every_n_steps=2 * every),
            folder,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=1,
            val_every_n_epochs=1,
            request=request,
        )
        saver.seconds = seconds
        beside = config.callback.build(
            folder=folder,
            request=request,
            images_per_update=plan.global_batch,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=1,
            log_every_n_steps=config.trainer.log_every_n_steps,
            val_every_n_epochs=1,
        )
        trainer = build_trainer(
            config.trainer,
            folder=folder.root,
            epochs=1,
            accumulate=plan.accumulate,
            clip_grad_norm=config.optim.clip_grad_norm,
            callbacks=[*(one for one in beside if not isinstance(one, Checkpoints)), BlockClock(seconds, every), saver],
            loggers=[],
            max_batches=updates * plan.accumulate,
            max_val_batches=0,
        )
        trainer.strategy.checkpoint_io = TimedIO(seconds)
        trainer.fit(module, datamodule=loaders)
    return folder.last.stat().st_size / 1e6
