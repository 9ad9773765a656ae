"""Where in a run a checkpoint stands, and Lightning's loops put there.

Lightning writes down some thirty counters, whose values depend on the hook in which a checkpoint was made and on the
number of micro-batches an update has. Two numbers say it all: from them the counters follow, for any later number of
devices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pytorch_lightning import Trainer
from pytorch_lightning.loops.progress import _ProcessedTracker

from fat_train.trainer.plan import RunPlan


class Position(NamedTuple):
    """So many updates are done, and, at an epoch's last one, its validation too."""

    updates: int
    epoch_ended: bool

    @classmethod
    def of(cls, trainer: Trainer, plan: RunPlan) -> Position:
        """Where a training is now."""
        epochs = trainer.fit_loop.epoch_progress.current
        assert isinstance(epochs, _ProcessedTracker)
        # `processed` rises when validation is over, before the hooks of an epoch's end are called
        return cls(trainer.global_step, epochs.processed * plan.steps_per_epoch == trainer.global_step)

    def loops(self, plan: RunPlan) -> dict[str, Any]:
        """State of Lightning's fit loop at this place: in the middle of an epoch, before its validation, or before the
        next epoch."""
        epoch, step = divmod(self.updates, plan.steps_per_epoch)
        validates_next = step == 0 and not self.epoch_ended and self.updates > 0
        if validates_next:
            epoch, step = epoch - 1, plan.steps_per_epoch
        within = step > 0
        batches, all_batches = step * plan.accumulate, self.updates * plan.accumulate
        optimizer = {
            "step": _pair(step, self.updates, "ready", "completed"),
            "zero_grad": _pair(step, self.updates, "ready", "started", "completed"),
        }
        epochs = {"ready": epoch + within, "started": epoch + within, "processed": epoch, "completed": epoch}
        # a validation that has begun its first batch and not finished it: Lightning then begins it again
        half_begun = dict.fromkeys(("ready", "started"), int(validates_next)) | {"processed": 0, "completed": 0}
        nothing = dict.fromkeys(STAGES, 0)
        return {
            "state_dict": {},
            "epoch_progress": {"current": epochs, "total": dict(epochs)},
            # Lightning counts the update as stepped only after its validation
            "epoch_loop.state_dict": {"_batches_that_stepped": self.updates - validates_next},
            "epoch_loop.batch_progress": _pair(batches, all_batches, *STAGES) | {"is_last_batch": validates_next},
            "epoch_loop.scheduler_progress": _pair(step, self.updates, "ready", "completed"),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {"optimizer": optimizer},
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": _pair(0, 0, "ready", "completed"),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": {"current": nothing, "total": half_begun, "is_last_batch": False},
        }


STAGES = ("ready", "started", "processed", "completed")


def _pair(current: int, total: int, *stages: str) -> dict[str, dict[str, int]]:
    return {"current": dict.fromkeys(stages, current), "total": dict.fromkeys(stages, total)}
