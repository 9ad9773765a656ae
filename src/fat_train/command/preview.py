"""preview: a contact sheet of what the pipeline feeds the model, made by the very code that trains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig

from fat_train.augment.device import to_pixels
from fat_train.command.assemble import build_task, device_of, open_run, path_of_out, plan_of, split_settings
from fat_train.command.say import say
from fat_train.config.run import plain
from fat_train.data.datamodule import build_loader
from fat_train.report.sheet import contact_sheet
from fat_train.task.step import StepKey
from fat_train.types import Batch, Labels, UserError


@dataclass(frozen=True, kw_only=True)
class PreviewSettings:
    """What `conf/preview.yaml` adds to a run's configuration."""

    count: int = 24
    """Pictures on the sheet."""
    epoch: int = 0
    """Epoch whose order and augmentation are shown."""
    out: str = "runs/preview.png"
    """The picture to write."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.epoch < 0:
            raise UserError(f"count must be at least 1 and epoch at least 0; got {self.count} and {self.epoch}")


def run(tree: DictConfig) -> Path:
    """Write the sheet; returns its path.

    Raises:
        UserError: as for a training run of the same words.
    """
    settings, values = split_settings(plain(tree), PreviewSettings)
    out = path_of_out(settings.out, ".png")
    config, source = open_run(values)
    plan = plan_of(config, source)
    device = device_of(config)
    loader = build_loader(
        config.data,
        source.train,
        "train",
        config.augment,
        batch_per_device=plan.batch_per_device,
        accumulate=plan.accumulate,
        world_size=plan.world_size,
        seed=config.run.seed,
        device=device,
    )
    loader.set_epoch(settings.epoch)
    task = build_task(config, source.num_classes)

    tiles: list[np.ndarray] = []
    captions: list[str] = []
    for number, batch in enumerate(loader):
        update, micro_batch = divmod(number, plan.accumulate)
        key = StepKey(config.run.seed, settings.epoch * plan.steps_per_epoch + update, micro_batch, rank=0)
        torch.manual_seed(key.torch_seed())
        images, labels = task.prepare(Batch(*(part.to(device) for part in batch)), key)
        tiles += list(to_pixels(images, task.mean, task.std).cpu().numpy())
        captions += captions_of(labels, source.train.classes)
        if len(tiles) >= settings.count:
            break
    header = (
        f"{config.data.name} · epoch {settings.epoch} · rank 0 of {plan.world_size} · "
        f"{config.augment.auto_augment or 'no auto-augment'} · a number before a label is its share of the picture"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    written = contact_sheet(tiles[: settings.count], captions[: settings.count], out, header=header)
    say(f"preview        {written} ({min(len(tiles), settings.count)} pictures as the model gets them in training)")
    return written


def captions_of(labels: Labels, classes: tuple[str, ...]) -> list[str]:
    """Two lines under each picture: its own label with λ, and what was mixed in with 1 − λ."""
    lines = []
    weights = torch.as_tensor(labels.weight).expand(len(labels.first)).tolist()  # one a picture, or one for all
    for first, second, weight in zip(labels.first.tolist(), labels.second.tolist(), weights, strict=True):
        if weight >= 1:
            lines.append(classes[first])
        else:
            lines.append(f"{weight:.2f} {classes[first]}\n{1 - weight:.2f} {classes[second]}")
    return lines
