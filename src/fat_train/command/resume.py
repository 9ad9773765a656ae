"""Whether a checkpoint is of the run that is asked for, and what has changed since."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fat_train.checkpoint.run_folder import StartingPoint
from fat_train.checkpoint.weights import read_checkpoint
from fat_train.config.run import RunConfig
from fat_train.data.datamodule import DataSource
from fat_train.trainer.plan import RunPlan
from fat_train.trainer.position import Position
from fat_train.types import UserError

WAYS_OUT = "Give another name=<name> for a new run, or resume=never overwrite=true to replace the old one"


class Resumed(NamedTuple):
    """A run that goes on."""

    path: Path
    position: Position
    kept: Mapping[str, Any]
    """What it says about the best checkpoints."""
    notes: tuple[str, ...]
    """What the user ought to know: damaged files, other images, another number of processes."""


def check_start(
    start: StartingPoint, config: RunConfig, source: DataSource, plan: RunPlan, values: dict[str, Any]
) -> Resumed:
    """Refuse a checkpoint of another run; say what else is no longer as it was.

    Raises:
        UserError: of another model, other classes, another global batch, or validated on images it has trained on.
    """
    path = start.path
    saved = read_checkpoint(path)
    about = saved.get("fat_train", {})
    if about.get("model") != config.model.name:
        raise UserError(f"{path} is a checkpoint of model={about.get('model')}, not of {config.model.name}. {WAYS_OUT}")
    changed = _changed_architecture(about["config"]["model"], values["model"])
    if changed:
        raise UserError(f"{path} is a checkpoint of another {config.model.name}: {changed}. {WAYS_OUT}")
    if about.get("classes") != list(source.train.classes):
        raise UserError(
            f"{path} was trained on {about.get('num_classes')} classes; data={config.data.name} has "
            f"{source.num_classes}, or others. {WAYS_OUT}"
        )
    before = (about.get("steps_per_epoch"), about["config"]["trainer"]["global_batch"])
    if before != (plan.steps_per_epoch, plan.global_batch):
        raise UserError(
            f"{path} was trained with {before[0]} updates an epoch and trainer.global_batch={before[1]}; this "
            f"configuration has {plan.steps_per_epoch} ({plan.train_images} images, "
            f"trainer.global_batch={plan.global_batch}). {WAYS_OUT}"
        )
    notes = [*start.notes, *_other_lists(path, about.get("data", {}), source)]
    if (about["world_size"], about["accumulate"]) != (plan.world_size, plan.accumulate):
        notes.append(_other_split(about["world_size"], about["accumulate"], plan))
    return Resumed(path, Position(*about["position"]), saved["callbacks"]["Checkpoints"], tuple(notes))


def fingerprints(source: DataSource) -> dict[str, str]:
    """What a checkpoint says about the lists of images."""
    return {"train": source.train.fingerprint, "val": source.val.fingerprint}


def _changed_architecture(saved: dict[str, Any], asked: dict[str, Any]) -> str:
    """What differs between two models' settings; drop path may change within a run."""
    keys = sorted({*saved, *asked} - {"drop_path_rate"})
    return ", ".join(
        f"model.{key} was {saved.get(key)}, now {asked.get(key)}" for key in keys if saved.get(key) != asked.get(key)
    )


def _other_lists(path: Path, saved: dict[str, str], source: DataSource) -> list[str]:
    """Other lists of images are the user's affair, unless a run would be validated on what it has trained on."""
    lists = fingerprints(source)
    if source.held_out and saved.get("val") != lists["val"]:
        raise UserError(
            f"{path} has trained on images that data.holdout would now hold out: its own held-out images were others, "
            f"or none. {WAYS_OUT}"
        )
    notes = []
    if saved.get("train") != lists["train"]:
        notes.append(f"the training images are not those of {path}: the order of the rest of the run is another")
    if saved.get("val") != lists["val"]:
        notes.append(f"the validation images are not those of {path}: accuracies do not compare with its own")
    return notes


def _other_split(processes: int, accumulate: int, plan: RunPlan) -> str:
    return (
        f"the global batch was {processes} processes x {accumulate} micro-batches, and is now {plan.world_size} x "
        f"{plan.accumulate}: the schedule,\nthe images of each update and their augmentation go on as they were. The "
        "weights will not be equal to the bit:\nsums are taken in another order, BatchNorm sees other batches, mixing "
        "and drop path are drawn for each process"
    )
