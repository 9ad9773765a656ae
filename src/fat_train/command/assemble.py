"""From a typed configuration to the parts of a run; shared by the commands that train, evaluate, preview and check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from fat_train.callback.kernels import load_stored
from fat_train.config.resolve import resolve
from fat_train.config.run import Problems, RunConfig, resolve_run
from fat_train.data.datamodule import DataSource, choose_backend, open_data
from fat_train.data.index import FileIndex
from fat_train.memory import keep_freed_memory
from fat_train.model.compiled import compile_model
from fat_train.op import table
from fat_train.op.choice import use
from fat_train.task.classification import Classification
from fat_train.trainer.build import TrainerConfig
from fat_train.trainer.loaders import RunLoaders
from fat_train.trainer.module import TrainingModule
from fat_train.trainer.plan import RunPlan, plan_run
from fat_train.types import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def open_run(values: Mapping[str, Any]) -> tuple[RunConfig, DataSource]:
    """Type and check the whole configuration, and list the data set.

    Raises:
        UserError: everything that is wrong with configuration, machine and data, in one message.
    """
    problems = Problems()
    config = resolve_run(values, problems)
    problems.raise_if_any()
    assert config is not None
    problems.catch(config.trainer.refuse_impossible)
    problems.catch(lambda: config.op.refuse_impossible(device_of(config).type))
    source = problems.catch(lambda: open_data(config.data))
    problems.catch(lambda: choose_backend(config.data.backend, device_of(config), config.data.decode))
    problems.raise_if_any()
    assert source is not None
    if config.debug.overfit_images:
        few = first_images(source.train, config.debug.overfit_images)
        source = replace(source, train=few, val=few)
    refuse_idle_ranks(config.trainer, source)
    return config, source


def refuse_idle_ranks(trainer: TrainerConfig, source: DataSource) -> None:
    """Every rank needs a validation image: Lightning leaves one without out of the sum, and the others wait for it.

    Raises:
        UserError: fewer validation images than processes.
    """
    if len(source.val) < trainer.devices * trainer.num_nodes:
        raise UserError(
            f"the validation set has {len(source.val)} images, fewer than the {trainer.devices * trainer.num_nodes} "
            "processes of trainer.devices x trainer.num_nodes: give fewer devices"
        )


def path_of_out(out: str, ending: str | tuple[str, ...], key: str = "out") -> Path:
    """Where a command's result goes; found out before the work, not after it, if it cannot be written there.

    Raises:
        UserError: a folder, another ending, or a parent that is no folder.
    """
    path = Path(out).expanduser()
    endings = (ending,) if isinstance(ending, str) else ending
    parents = [parent for parent in path.parents if parent.exists()]
    if path.suffix not in endings or path.is_dir() or not parents[0].is_dir():
        wanted = " or ".join(endings)
        raise UserError(f"{key}={out} must be a file that ends in {wanted}, in a folder that is there or can be made")
    return path


def split_settings(values: Mapping[str, Any], cls: type[S]) -> tuple[S, dict[str, Any]]:
    """A command's own root keys, typed, and what remains: the configuration of the run that it looks at."""
    own = {field.name: values[field.name] for field in fields(cls) if field.name in values}
    return resolve(own, cls, where=""), {key: value for key, value in values.items() if key not in own}


def plan_of(config: RunConfig, source: DataSource) -> RunPlan:
    """The derived numbers of the run."""
    return plan_run(
        config.trainer,
        config.optim,
        config.schedule,
        train_images=len(source.train),
        repeats=config.augment.repeats,
        max_steps_per_epoch=config.debug.max_steps_per_epoch,
    )


def build_task(config: RunConfig, num_classes: int) -> Classification:
    """Model, loss and augmentation as one task; the model in its memory format, on the CPU. From here on this process
    computes the operations as `op` says, on a GPU by what was measured there."""
    use(config.op)
    if config.trainer.kind == "cpu":
        keep_freed_memory()
    device = device_of(config)
    (load_stored(device) if device.type == "cuda" else table.empty(device)).take()
    model = config.model.build(num_classes=num_classes)
    if config.trainer.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if config.trainer.grad_checkpointing:
        model.set_grad_checkpointing()
    compile_model(model, config.trainer.way_to_compile)
    return config.task.build(model, config.loss.build(), config.augment, config.data.mean, config.data.std)


def build_training(
    config: RunConfig, source: DataSource, plan: RunPlan, provenance: dict[str, Any]
) -> tuple[TrainingModule, RunLoaders]:
    """What `Trainer.fit` wants: the task with its optimiser and schedule, and the loaders at the run's place."""
    module = TrainingModule(
        build_task(config, source.num_classes),
        config.optim,
        config.schedule,
        plan,
        seed=config.run.seed,
        provenance=provenance,
    )
    loaders = RunLoaders(
        config.data, source, config.augment, plan=plan, batch_per_device=plan.batch_per_device, seed=config.run.seed
    )
    return module, loaders


def device_of(config: RunConfig) -> torch.device:
    """The kind of device that the run trains on."""
    return torch.device({"gpu": "cuda"}.get(config.trainer.kind, config.trainer.kind))


def first_images(index: FileIndex, count: int) -> FileIndex:
    """The first image of every class, then the second of every class, and so on up to `count`: few images of many
    classes, where the first of the list would all be of one."""
    seen: Counter[int] = Counter()
    turns = []
    for row, target in enumerate(index.targets.tolist()):
        turns.append((seen[target], row))
        seen[target] += 1
    rows = [row for _, row in sorted(turns)[:count]]
    return index.take(np.array(rows))
