"""Linear warm-up, then half a cosine, by optimiser update: timm's scheduler under FAT's settings."""

from __future__ import annotations

from dataclasses import dataclass

from timm.scheduler import CosineLRScheduler
from torch.optim import Optimizer

from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class CosineConfig:
    """The learning rate at each update, in units a person writes; rates are per `optim.lr_per_images` images."""

    epochs: int = 300
    """Length of the run."""
    warmup_epochs: float = 20
    """Epochs of linear rise from `warmup_lr` to the base rate; fractions are allowed."""
    warmup_lr: float = 5e-7
    """Rate of the very first update, scaled by the global batch as the base rate is."""
    min_lr: float = 5e-6
    """Rate that the cosine ends at, scaled alike."""
    warmup_prefix: bool = False
    """False (FAT's released code): the cosine runs from update 0 and the warm-up hides its first part, so the rate
    steps down by 1 % where the warm-up ends. True (Swin): the cosine starts at its peak after the warm-up."""

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"schedule.epochs must be at least 1; got {self.epochs}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"schedule.warmup_epochs must be in [0, schedule.epochs={self.epochs}); got {self.warmup_epochs}"
            )
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) < 0:
                raise UserError(f"schedule.{name} must not be negative; got {getattr(self, name)}")

    def build(
        self, optimizer: Optimizer, *, total_steps: int, warmup_steps: int, warmup_lr: float, min_lr: float
    ) -> CosineLRScheduler:
        """The schedule over `total_steps` updates, with rates already scaled to the global batch.

        Call `step_update(k)` after update k - 1; update k then runs at the rate of step k. (FAT's released loop calls
        it one update late, so that its update k runs at the rate of step k - 1; the curve is the same otherwise.)
        """
        return CosineLRScheduler(
            optimizer,
            t_initial=total_steps - warmup_steps if self.warmup_prefix else total_steps,
            lr_min=min_lr,
            warmup_t=warmup_steps,
            warmup_lr_init=warmup_lr,
            warmup_prefix=self.warmup_prefix,
            t_in_epochs=False,
        )
