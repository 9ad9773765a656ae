"""From human units to the numbers a run uses: accumulation, scaled rates, updates. Computed here alone."""

from __future__ import annotations

from dataclasses import dataclass

from fat_train.data.order import refuse_scattered_copies
from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.trainer.build import TrainerConfig
from fat_train.types import UserError

SMALL_BATCH = 8
"""Fewer images than this in a micro-batch make BatchNorm's statistics noise."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What the configured run comes to. An update is one optimiser step over one global batch."""

    global_batch: int
    batch_per_device: int
    accumulate: int
    world_size: int
    train_images: int
    repeats: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    warmup_steps: int
    lr: float
    warmup_lr: float
    min_lr: float
    rate_formula: str
    shortened: bool

    def lines(self) -> list[str]:
        """Each derived number with its formula, for the start of the log."""
        epoch = f"{self.train_images} images // {self.global_batch}"
        why = (
            "cut short by debug.max_steps_per_epoch" if self.shortened else "the rest waits for the next epoch's order"
        )
        distinct = -(-self.steps_per_epoch * self.global_batch // self.repeats)
        repeated = f"repeats        {distinct} images an epoch, each {self.repeats} times, augmented each time"
        return [
            f"global batch   {self.global_batch} = {self.batch_per_device} images x {self.world_size} devices "
            f"x {self.accumulate} accumulated",
            *([repeated] if self.repeats > 1 else []),
            f"updates        {self.total_steps} = {self.epochs} epochs x {self.steps_per_epoch} ({epoch}, {why})",
            f"learning rate  {self.warmup_lr:.3e} -> {self.lr:.3e} in {self.warmup_steps} updates "
            f"-> {self.min_lr:.3e} ({self.rate_formula}, the others alike)",
        ]


def plan_run(
    trainer: TrainerConfig,
    optim: AdamWConfig,
    schedule: CosineConfig,
    *,
    train_images: int,
    repeats: int = 1,
    max_steps_per_epoch: int = 0,
) -> RunPlan:
    """Split the global batch over devices and accumulation, and scale the rates to it.

    Args:
        trainer: devices, nodes, the global batch and the most images that one device holds at once.
        optim: the rate and the number of images that it is given for.
        schedule: epochs and rates, in human units.
        train_images: pictures in the training set.
        repeats: times that one of them comes in an epoch (`AugmentConfig.repeats`).
        max_steps_per_epoch: cut epochs short (debugging); 0 does not.

    Raises:
        UserError: the global batch does not divide over the devices, is larger than the set, or smaller than `repeats`.
    """
    world_size = trainer.devices * trainer.num_nodes
    accumulate = _accumulation(trainer.global_batch, world_size, trainer.max_batch_per_device)
    steps_per_epoch = train_images // trainer.global_batch
    if steps_per_epoch == 0:
        raise UserError(
            f"trainer.global_batch={trainer.global_batch} is more than the {train_images} images of the training set; "
            f"give trainer.global_batch={_largest_multiple(train_images, world_size)} or less"
        )
    refuse_scattered_copies(repeats, trainer.global_batch)
    shortened = 0 < max_steps_per_epoch < steps_per_epoch
    if shortened:
        steps_per_epoch = max_steps_per_epoch
    scale = trainer.global_batch / optim.lr_per_images
    return RunPlan(
        global_batch=trainer.global_batch,
        batch_per_device=trainer.global_batch // (world_size * accumulate),
        accumulate=accumulate,
        world_size=world_size,
        train_images=train_images,
        repeats=repeats,
        steps_per_epoch=steps_per_epoch,
        epochs=schedule.epochs,
        total_steps=schedule.epochs * steps_per_epoch,
        warmup_steps=round(schedule.warmup_epochs * steps_per_epoch),
        lr=optim.base_lr * scale,
        warmup_lr=schedule.warmup_lr * scale,
        min_lr=schedule.min_lr * scale,
        rate_formula=f"{optim.base_lr:g} x {trainer.global_batch} / {optim.lr_per_images}",
        shortened=shortened,
    )


def _accumulation(global_batch: int, world_size: int, max_batch_per_device: int) -> int:
    """The fewest micro-batches that fit a device and divide the global batch."""
    if global_batch % world_size:
        near = _largest_multiple(global_batch, world_size)
        raise UserError(
            f"trainer.global_batch={global_batch} does not divide over {world_size} devices "
            "(trainer.devices x trainer.num_nodes); "
            f"the nearest that do are {near or world_size} and {near + world_size}"
        )
    per_device = global_batch // world_size
    parts = next(n for n in range(1, per_device + 1) if per_device % n == 0 and per_device // n <= max_batch_per_device)
    if parts > 1 and per_device // parts < min(SMALL_BATCH, max_batch_per_device):
        near = _largest_multiple(global_batch, world_size * max_batch_per_device)
        raise UserError(
            f"trainer.global_batch={global_batch} only divides into micro-batches of {per_device // parts} images, too "
            f"few for BatchNorm; give a number that divides better, such as {near or world_size * max_batch_per_device}"
        )
    return parts


def _largest_multiple(bound: int, factor: int) -> int:
    return bound // factor * factor
