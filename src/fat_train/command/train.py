"""train: config in, trained and checkpointed model out. The order of the lines is the order of events."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from fat_train.callback.checkpoint import delete_dropped
from fat_train.callback.cold_start import ColdStart
from fat_train.callback.kernels import Kernels
from fat_train.callback.preemption import LeaveRequest
from fat_train.checkpoint.provenance import provenance
from fat_train.checkpoint.run_folder import RunFolder, StartingPoint
from fat_train.command.assemble import build_training, device_of, open_run, plan_of
from fat_train.command.resume import Resumed, check_start, fingerprints
from fat_train.command.say import complain, is_rank_zero, say, this_python
from fat_train.config.run import RunConfig, plain
from fat_train.data.datamodule import DataSource, SyntheticDataConfig, choose_backend
from fat_train.report.table import REPORT_FILE, write_report
from fat_train.trainer import compiler
from fat_train.trainer.build import build_trainer
from fat_train.trainer.lost_rank import lost_rank
from fat_train.trainer.plan import RunPlan
from fat_train.types import UnfinishedRunError


def run(tree: DictConfig) -> None:
    """Train the run that the tree describes, or go on with it.

    Raises:
        UserError: something in the configuration, the data or the machine that the user can mend.
        UnfinishedRunError: the run saved and left before its end.
    """
    values = plain(tree)
    config, source = open_run(values)
    plan = plan_of(config, source)
    folder = RunFolder(config.root)
    # Other ranks may look when rank 0 has begun to write: what is there is then this run's own.
    start = folder.starting_point(config.run.resume, config.run.overwrite or not is_rank_zero())
    resumed = None if start is None else check_start(start, config, source, plan, values)
    if resumed is not None and resumed.position.epoch_ended and resumed.position.updates >= plan.total_steps:
        _tell_notes(resumed)
        say(_finished(config, folder, resumed, plan))
        return
    with ExitStack() as stack:
        if is_rank_zero():
            stack.enter_context(folder.held())
            if start is None:
                folder.clear()
            else:
                folder.begin_at(start)
            _announce(config, source, plan, folder, resumed, values)
            folder.write_config(values)
        request = stack.enter_context(LeaveRequest(config.callback.preemption, speaks=is_rank_zero()))
        _fit(config, source, plan, folder, start, request, values)
    if is_rank_zero():
        say(_farewell(folder, *write_report(folder.root)))


def _fit(
    config: RunConfig,
    source: DataSource,
    plan: RunPlan,
    folder: RunFolder,
    start: StartingPoint | None,
    request: LeaveRequest,
    values: dict[str, Any],
) -> None:
    """Lightning's training, and what its ends mean."""
    pl.seed_everything(config.run.seed, verbose=False)
    wandb_id = config.logger.wandb_id(folder.root, start and start.path) if is_rank_zero() else None
    about = _provenance(values, config, source, plan) | {"wandb_id": wandb_id}
    module, loaders = build_training(config, source, plan, about)
    trainer = build_trainer(
        config.trainer,
        folder=folder.root,
        epochs=plan.epochs,
        accumulate=plan.accumulate,
        clip_grad_norm=config.optim.clip_grad_norm,
        callbacks=[
            _kernels(config, plan, folder),
            ColdStart(),
            *config.callback.build(
                folder=folder,
                request=request,
                images_per_update=plan.global_batch,
                steps_per_epoch=plan.steps_per_epoch,
                epochs=plan.epochs,
                log_every_n_steps=config.trainer.log_every_n_steps,
                val_every_n_epochs=config.trainer.val_every_n_epochs,
            ),
        ],
        loggers=config.logger.build(folder.root, config.name, values, wandb_id) if is_rank_zero() else [],
        max_batches=plan.steps_per_epoch * plan.accumulate,
        max_val_batches=config.debug.max_val_batches or None,
        profile=config.debug.profile,
    )
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=start and start.path, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C before the first update, or to a second one
        kept = f"goes on from {folder.last}" if folder.last.exists() else "starts again: nothing was saved yet"
        say(f"interrupted    the same command {kept}")
        raise KeyboardInterrupt from stop
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        complain(f"{lost}\nWhen all processes have ended, the same commands go on from the last checkpoint")
        raise UnfinishedRunError(lost, status=1) from error


def _kernels(config: RunConfig, plan: RunPlan, folder: RunFolder) -> Kernels:
    return Kernels(
        config.op,
        folder.kernels,
        image_px=config.data.image_px,
        batch_per_device=plan.batch_per_device,
        deterministic=config.trainer.deterministic,
    )


def _provenance(values: dict[str, Any], config: RunConfig, source: DataSource, plan: RunPlan) -> dict[str, Any]:
    return provenance(
        values,
        model=config.model.name,
        classes=source.train.classes,
        steps_per_epoch=plan.steps_per_epoch,
        fingerprints=fingerprints(source),
    )


def _announce(
    config: RunConfig,
    source: DataSource,
    plan: RunPlan,
    folder: RunFolder,
    resumed: Resumed | None,
    values: dict[str, Any],
) -> None:
    """Say what is about to happen, each derived number with its formula."""
    say(f"run            {config.name} in {folder.root}")
    say("data           " + source.describe().replace("\n", "\n" + " " * 15))
    if not isinstance(config.data, SyntheticDataConfig):
        backend = choose_backend(config.data.backend, device_of(config), config.data.decode)
        say(f"               {backend.reason}")
    for line in plan.lines():
        say(line)
    for line in compiler.lines(config.trainer.compile, config.trainer.kind, plan.world_size):
        say(line)
    if plan.world_size > 1:
        synced = "synchronised over all devices" if config.trainer.kind == "gpu" else "of each process (CPU)"
        say(f"BatchNorm      statistics are {synced}")
    if resumed is None:
        return
    say(f"resuming       from {resumed.path}, at update {resumed.position.updates}")
    _tell_notes(resumed)
    for line in folder.config_diff(values):
        say(f"  changed      {line}")


def _tell_notes(resumed: Resumed) -> None:
    for note in resumed.notes:
        say("warning        " + note.replace("\n", "\n" + " " * 15))


def _finished(config: RunConfig, folder: RunFolder, resumed: Resumed, plan: RunPlan) -> str:
    if is_rank_zero():  # the end may have come right after the last checkpoint
        delete_dropped(folder, resumed.kept)
        if folder.halves():  # as of a report that was killed
            with folder.held():
                pass
        report = folder.root / REPORT_FILE
        if not report.exists() or report.stat().st_mtime < folder.metrics.stat().st_mtime:
            write_report(folder.root)
    return (
        f"{config.name} is finished: {resumed.path} has {resumed.position.updates // plan.steps_per_epoch} epochs "
        "behind it, "
        f"schedule.epochs={config.schedule.epochs} asks for no more.\n"
        f"Evaluate it:    {this_python()} -m fat_train evaluate checkpoint={resumed.path}\n"
        "Train longer:   give a larger schedule.epochs\n"
        "Start again:    resume=never overwrite=true, or another name=<name>"
    )


def _farewell(folder: RunFolder, curves: Path, table: Path) -> str:
    best = sorted(folder.checkpoints.glob("best-*.ckpt"), key=lambda file: float(file.stem.rpartition("-")[2]))
    checkpoint = best[-1] if best else folder.last
    return (
        f"checkpoint     {checkpoint}\n"
        f"metrics        {folder.metrics}\n"
        f"curves         {curves}\n"
        f"table          {table}\n"
        f"next           {this_python()} -m fat_train evaluate checkpoint={checkpoint}"
    )
