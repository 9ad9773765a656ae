"""The kernels of a run: measured once on a kind of GPU, the same on all ranks, and kept with the run."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from fat_train.cache import cache_folder
from fat_train.callback.progress import tell
from fat_train.checkpoint.io import write_atomically
from fat_train.op import table
from fat_train.op.choice import AUTO, OpConfig
from fat_train.op.table import Row, Table
from fat_train.op.tune import cases_of, tune
from fat_train.types import UserError

MEASURED_ON = ("cuda",)
"""Elsewhere `auto` is a fixed choice, so that a run repeats to the bit on any day."""
ROUNDS = 10
DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Kernels(Callback):
    """Before the first forward pass, tells `op=auto` what is fastest for the shapes of this run.

    In this order: what the run has used so far, if it was on such a device; what an earlier run or `benchmark op`
    has measured on such a device; and what is in neither is measured now, by rank 0, in seconds. With
    `trainer.deterministic` nothing is measured: what is known in neither place is the fixed choice.

    Args:
        op: the run's settings; without any `auto` there is nothing to do.
        file: kernels.json of the run.
        image_px: side of its images.
        batch_per_device: images of a micro-batch, and of a validation batch.
        deterministic: `trainer.deterministic`.
    """

    op: OpConfig
    file: Path
    image_px: int
    batch_per_device: int
    deterministic: bool

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank 0 finds the table; all ranks get it."""
        device = trainer.strategy.root_device
        if device.type not in MEASURED_ON or AUTO not in astuple(self.op):
            return
        found = self._find(trainer, pl_module, device) if trainer.is_global_zero else None
        agreed = trainer.strategy.broadcast(found)
        assert isinstance(agreed, Table)
        agreed.take()

    def _find(self, trainer: Trainer, module: LightningModule, device: torch.device) -> Table:
        cases = cases_of(
            module.model,  # type: ignore[arg-type]
            batch_size=self.batch_per_device,
            image_px=self.image_px,
            dtype=DTYPES[str(trainer.precision)],
        )
        keys = [case.key for case in cases]
        used = table.load(self.file)
        if used is not None and not used.is_of(device):
            tell(trainer, f"kernels        {self.file} is of {used.device}: other kernels for this device")
            used = None
        stored = load_stored(device)
        rows = {**stored.rows, **(used.rows if used is not None else {})}
        known = stored.with_rows(rows).only(keys)
        lacking = set(known.lacks(keys))
        if lacking and self.deterministic:
            fixed = {key: Row(key, AUTO) for key in known.lacks(keys)}  # and stays so if the run goes on
            known = known.with_rows({**known.rows, **fixed})
        elif lacking:
            tell(trainer, f"kernels        timing {len(lacking)} shapes on this {known.device}, once ...")
            fresh = tune([case for case in cases if case.key in lacking], device, rounds=ROUNDS)
            known = known.with_rows({**known.rows, **fresh.rows})
            if device.type == "cuda":
                torch.cuda.empty_cache()
            trouble = store(fresh, device)
            if trouble:
                tell(trainer, f"Warning: {trouble}: the next run measures again")
        write_atomically(self.file, known.as_json())
        tell(trainer, f"kernels        {known.sentence()}; details: {self.file}")
        return known


def load_stored(device: torch.device) -> Table:
    """What was measured on such a device under these releases; a table without rows where nothing was."""
    return table.load(table.path_of(cache_folder(), device)) or table.empty(device)


def store(fresh: Table, device: torch.device) -> str:
    """Add rows to what is kept for such devices; returns why that failed, or nothing."""
    try:
        rows = {**load_stored(device).rows, **fresh.rows}
        write_atomically(table.path_of(cache_folder(), device), fresh.with_rows(rows).as_json())
    except UserError as error:
        return str(error)
    return ""
