"""train: config in, trained and checkpointed model out. The order of the lines is the order of events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig

from fat_train.checkpoint.provenance import provenance
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.command.assemble import build_training, device_of, open_run, plan_of
from fat_train.command.say import complain, is_rank_zero, say, this_python
from fat_train.config.run import RunConfig, plain
from fat_train.data.datamodule import DataSource, SyntheticDataConfig, choose_backend
from fat_train.report.table import write_report
from fat_train.trainer.build import build_trainer
from fat_train.trainer.lost_rank import lost_rank
from fat_train.trainer.plan import RunPlan
from fat_train.types import UnfinishedRunError, UserError


def run(tree: DictConfig) -> None:
    """Train the run that the tree describes, or go on with it.

    Raises:
        UserError: something in the configuration, the data or the machine that the user can mend.
    """
    values = plain(tree)
    config, source = open_run(values)
    plan = plan_of(config, source)
    folder = RunFolder(config.root)
    # Other ranks may look when rank 0 has begun to write: what is there is then this run's own.
    start = folder.starting_point(config.run.resume, config.run.overwrite or not is_rank_zero())
    if start is not None:
        updates = _finished_updates(start, config, source, plan, values)
        if updates >= plan.total_steps:
            say(_finished(config, start, updates // plan.steps_per_epoch))
            return
    if is_rank_zero():
        folder.sweep()
        if start is None:
            folder.clear()
        _announce(config, source, plan, folder, start, values)
        folder.write_config(values)

    pl.seed_everything(config.run.seed, verbose=False)
    wandb_id = config.logger.wandb_id(folder.root, start) if is_rank_zero() else None
    about = _provenance(values, config, source, plan) | {"wandb_id": wandb_id}
    module, loaders = build_training(config, source, plan, about)
    trainer = build_trainer(
        config.trainer,
        folder=folder.root,
        epochs=plan.epochs,
        accumulate=plan.accumulate,
        clip_grad_norm=config.optim.clip_grad_norm,
        callbacks=config.callback.build(
            checkpoints=folder.checkpoints,
            metrics=folder.metrics,
            images_per_update=plan.global_batch,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=plan.epochs,
            log_every_n_steps=config.trainer.log_every_n_steps,
            val_every_n_epochs=config.trainer.val_every_n_epochs,
        ),
        loggers=config.logger.build(folder.root, config.name, values, wandb_id) if is_rank_zero() else [],
        max_batches=plan.steps_per_epoch * plan.accumulate,
        max_val_batches=config.debug.max_val_batches or None,
        profile=config.debug.profile,
    )
    try:
        trainer.fit(module, datamodule=loaders, ckpt_path=start, weights_only=True)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C
        kept = f"goes on from {folder.last}" if folder.last.exists() else "starts again: no epoch was finished yet"
        say(f"interrupted    the same command {kept}")
        raise KeyboardInterrupt from stop
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        complain(f"{lost}\nWhen all processes have ended, the same commands go on from the last checkpoint")
        raise UnfinishedRunError(lost, status=1) from error
    if is_rank_zero():
        say(_farewell(folder, *write_report(folder.root)))


def _changed_architecture(saved: dict[str, Any], asked: dict[str, Any]) -> str:
    """What differs between two models' settings; drop path may change within a run."""
    keys = sorted({*saved, *asked} - {"drop_path_rate"})
    return ", ".join(
        f"model.{key} was {saved.get(key)}, now {asked.get(key)}" for key in keys if saved.get(key) != asked.get(key)
    )


def _finished_updates(start: Path, config: RunConfig, source: DataSource, plan: RunPlan, values: dict[str, Any]) -> int:
    """Updates that a checkpoint has behind it, once it is known to be of this run."""
    try:
        saved = read_checkpoint(start)
    except UserError as error:
        raise UserError(
            f"{error}\nMove it away, and copy the best-*.ckpt beside it to last.ckpt to go on from that one; "
            "resume=never overwrite=true starts again"
        ) from error
    about = saved.get("fat_train", {})
    ways_out = "Give another name=<name> for a new run, or resume=never overwrite=true to replace the old one"
    if about.get("model") != config.model.name:
        raise UserError(
            f"{start} is a checkpoint of model={about.get('model')}, not of {config.model.name}. {ways_out}"
        )
    changed = _changed_architecture(about["config"]["model"], values["model"])
    if changed:
        raise UserError(f"{start} is a checkpoint of another {config.model.name}: {changed}. {ways_out}")
    if about.get("classes") != list(source.train.classes):
        raise UserError(
            f"{start} was trained on {about.get('num_classes')} classes; data={config.data.name} has "
            f"{source.num_classes}, or others. {ways_out}"
        )
    if about.get("steps_per_epoch") != plan.steps_per_epoch:
        raise UserError(
            f"{start} was trained with {about.get('steps_per_epoch')} updates an epoch; this configuration has "
            f"{plan.steps_per_epoch} ({plan.train_images} images, trainer.global_batch={plan.global_batch}). {ways_out}"
        )
    _compare_lists(start, about.get("data", {}), source, ways_out)
    return int(saved["global_step"])


def _compare_lists(start: Path, saved: dict[str, str], source: DataSource, ways_out: str) -> None:
    """Other lists of images are the user's affair, unless a run would be validated on what it has trained on."""
    lists = _fingerprints(source)
    if source.held_out and saved.get("val") != lists["val"]:
        raise UserError(
            f"{start} has trained on images that data.holdout would now hold out: its own held-out images were others, "
            f"or none. {ways_out}"
        )
    if saved.get("train") != lists["train"]:
        say(f"warning        the training images are not those of {start}: the order of the rest of the run is another")
    if saved.get("val") != lists["val"]:
        say(f"warning        the validation images are not those of {start}: accuracies do not compare with its own")


def _provenance(values: dict[str, Any], config: RunConfig, source: DataSource, plan: RunPlan) -> dict[str, Any]:
    return provenance(
        values,
        model=config.model.name,
        classes=source.train.classes,
        steps_per_epoch=plan.steps_per_epoch,
        fingerprints=_fingerprints(source),
    )


def _fingerprints(source: DataSource) -> dict[str, str]:
    return {"train": source.train.fingerprint, "val": source.val.fingerprint}


def _announce(
    config: RunConfig, source: DataSource, plan: RunPlan, folder: RunFolder, start: Path | None, values: dict[str, Any]
) -> None:
    """Say what is about to happen, each derived number with its formula."""
    say(f"run            {config.name} in {folder.root}")
    say("data           " + source.describe().replace("\n", "\n" + " " * 15))
    if not isinstance(config.data, SyntheticDataConfig):
        backend = choose_backend(config.data.backend, device_of(config), config.data.decode)
        say(f"               {backend.reason}")
    for line in plan.lines():
        say(line)
    if plan.world_size > 1:
        synced = "synchronised over all devices" if config.trainer.kind == "gpu" else "of each process (CPU)"
        say(f"BatchNorm      statistics are {synced}")
    if start is None:
        return
    say(f"resuming       from {start}")
    for line in folder.config_diff(values):
        say(f"  changed      {line}")


def _finished(config: RunConfig, start: Path, epochs: int) -> str:
    return (
        f"{config.name} is finished: {start} has {epochs} epochs behind it, "
        f"schedule.epochs={config.schedule.epochs} asks for no more.\n"
        f"Evaluate it:    {this_python()} -m fat_train evaluate checkpoint={start}\n"
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
