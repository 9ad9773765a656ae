"""Guards against what goes wrong inside a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning import Callback

from fat_train.callback.finite import SkipNonFinite
from fat_train.callback.hang import HangWatch
from fat_train.callback.spike import SpikeWatch
from fat_train.types import UserError


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """When a run leaves an update out, speaks up, or ends itself."""

    max_skipped: int = 3
    """Most updates in a row that are left out because loss or gradient is not finite; 0 stops at the first."""
    spike_sigma: float = 6.0
    """Say so when the loss is so many deviations above its running mean; 0 does not watch it."""
    spike_window: int = 100
    """Updates that this mean looks back on; as many pass before the first word."""
    hang_minutes: float = 30.0
    """End a rank that has made no progress for so long, three times that where it begins something; 0 never does."""

    def __post_init__(self) -> None:
        for name in ("max_skipped", "spike_sigma", "hang_minutes"):
            if getattr(self, name) < 0:
                raise UserError(f"callback.guard.{name} must not be negative; got {getattr(self, name)}")
        if self.spike_window < 2:
            raise UserError(f"callback.guard.spike_window must be at least 2 updates; got {self.spike_window}")

    def build(self, *, folder: Path, last_checkpoint: Path) -> list[Callback]:
        """The callbacks; they come before all others, so that none averages or saves what is to be left out.

        Args:
            folder: of the run.
            last_checkpoint: the file that holds the last good weights, once one is written.
        """
        callbacks: list[Callback] = [SkipNonFinite(self.max_skipped, folder, last_checkpoint)]
        if self.hang_minutes:
            callbacks.append(HangWatch(60 * self.hang_minutes, folder))
        if self.spike_sigma:
            callbacks.append(SpikeWatch(self.spike_sigma, self.spike_window))
        return callbacks
