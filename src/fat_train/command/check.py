"""check: everything that a long run would stumble over, before it starts."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from rich.console import Console

from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import build_training, open_run, path_of_out, plan_of, split_settings
from fat_train.command.say import is_rank_zero, say
from fat_train.config.run import RunConfig, plain
from fat_train.data.datamodule import DataSource, FilesDataConfig, SyntheticDataConfig
from fat_train.report.dataset import DatasetReport, exclude_list, scan_dataset
from fat_train.report.machine import estimate, machine_facts, machine_table
from fat_train.report.scan_cache import ScanCache
from fat_train.trainer.build import available_cores, build_trainer
from fat_train.trainer.plan import RunPlan
from fat_train.types import Batch, UserError

SETTLING_SHARE = 0.3
"""Of the timed seconds, the first part that does not count: threads start, caches fill, kernels are chosen."""


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    """What `conf/check.yaml` adds to a run's configuration."""

    read_files: bool = True
    """Decode every file once."""
    seconds: float = 60.0
    """Seconds of training to time; 0 times nothing."""
    out: str = "runs/check.json"
    """Where everything that was found is kept, every path included."""
    exclude_out: str | None = "runs/exclude.txt"
    """Where images that stop or spoil training are listed, for data.exclude; null writes no list."""

    def __post_init__(self) -> None:
        if self.seconds < 0:
            raise UserError(f"seconds must not be negative; got {self.seconds}")


class SpeedTest(pl.Callback):
    """Stops training, on all ranks at once, after some seconds; knows the images per second after the settling.

    The clock starts when the first batch is through: compiling, and the start of the loader, do not count.
    """

    def __init__(self, seconds: float, images_per_batch: int) -> None:
        self.seconds = seconds
        self.images_per_batch = images_per_batch
        self.images_per_s: float | None = None
        self._started: float | None = None
        self._settled: float | None = None
        self._batches = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and stop in time. At least one batch is counted, however slow."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._started is None:
            self._started = now
        elif self._settled is None:
            if now - self._started >= SETTLING_SHARE * self.seconds:
                self._settled = now
        else:
            self._batches += 1
            self.images_per_s = self._batches * self.images_per_batch / (now - self._settled)
        over = self.images_per_s is not None and now - self._started >= self.seconds
        if trainer.strategy.reduce_boolean_decision(over, all=False):
            trainer.should_stop = True


def run(tree: DictConfig) -> None:
    """Say what was found; the process ends with 2 where training would fail.

    Raises:
        UserError: something that would stop the run.
    """
    settings, values = split_settings(plain(tree), CheckSettings)
    out = path_of_out(settings.out, ".json")
    list_file = None if settings.exclude_out is None else path_of_out(settings.exclude_out, ".txt", "exclude_out")
    config, source = open_run(values)
    plan = plan_of(config, source)
    if not is_rank_zero():  # started by rank 0 to take part in the timing
        images_per_second(config, source, plan, settings.seconds)
        return
    console = Console()
    facts = machine_facts(config.root, _root(config, source))
    console.print(machine_table(facts))
    say(f"configuration  {config.name}: good")
    say("data           " + source.describe().replace("\n", "\n" + " " * 15))
    for line in plan.lines():
        say(line)
    found: dict[str, Any] = {"machine": facts, "plan": plan.__dict__}

    report = _scan(source, console) if settings.read_files and _root(config, source) else None
    remedy = "mend or remove them"
    if report is not None:
        found["data"] = report.as_dict()
        if report.excluded() and list_file is not None and isinstance(config.data, FilesDataConfig):
            remedy = f"mend them, or leave them out with data.exclude={list_file}"
            count = _write_list(list_file, report, config.data.exclude)
            say(f"leave out      {count:,} images, listed in {list_file}: add data.exclude={list_file} to the run")
    trainable = report is None or report.is_trainable
    if settings.seconds and trainable:
        say(f"timing         {settings.seconds:g} s of training ...")
        rate = images_per_second(config, source, plan, settings.seconds)
        found["images_per_s"] = rate
        say(f"estimate       {estimate(rate, plan.steps_per_epoch * plan.global_batch, plan.epochs)}")
    write_atomically(out, json.dumps(found, indent=1))
    say(f"details        {out}")
    if not trainable:
        raise UserError(f"the data set has images that would stop training (named above): {remedy}")


def images_per_second(config: RunConfig, source: DataSource, plan: RunPlan, seconds: float) -> float:
    """The whole job's training speed, by training for some seconds and throwing the result away.

    Raises:
        UserError: the run was over before it had settled: too few updates, or too few seconds.
    """
    test = SpeedTest(seconds, plan.batch_per_device * plan.world_size)
    module, loaders = build_training(config, source, plan, provenance={})
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            config.trainer,
            folder=Path(folder),
            epochs=plan.epochs,
            accumulate=plan.accumulate,
            clip_grad_norm=config.optim.clip_grad_norm,
            callbacks=[test],
            loggers=[],
            max_val_batches=0,
        )
        trainer.fit(module, datamodule=loaders)
    if test.images_per_s is None:
        raise UserError(f"seconds={seconds:g} of this run were too few to time it: give more seconds, or a longer run")
    return test.images_per_s


def _root(config: RunConfig, source: DataSource) -> Path | None:
    return None if isinstance(config.data, SyntheticDataConfig) else source.root


def _write_list(file: Path, report: DatasetReport, in_force: str | None) -> int:
    """Write the list of images to leave out, those of the list in force included; returns how many were added to it."""
    old = "" if in_force is None else Path(in_force).expanduser().read_text(errors="surrogateescape")
    images = report.excluded()
    write_atomically(file, exclude_list(images, old))
    return len(images)


def _scan(source: DataSource, console: Console) -> DatasetReport:
    cache = ScanCache(source.root)
    report = scan_dataset(source.train, source.val, workers=available_cores(), console=console, cache=cache)
    console.print(report.table())
    for line in report.lines():
        say(line)
    return report
