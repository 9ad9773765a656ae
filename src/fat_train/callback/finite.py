"""Leave out an update whose loss or gradient is not finite; after too many in a row stop, and keep the last one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from fat_train.callback.buffers import BuffersBefore
from fat_train.callback.epoch_meter import Reading
from fat_train.callback.faulty_update import KEY, FaultyUpdate, by_layer_group, norm_table
from fat_train.callback.progress import tell
from fat_train.optim.adamw import leave_out_where, left_out, parameters_with_gradient
from fat_train.types import Batch, UserError

LINES = 20
"""Updates that a run tells of when they are left out; later ones are only counted."""


class NonFiniteError(UserError):
    """Loss, gradient or weights became NaN or infinite. The message holds the update, the rate, and gradient norms by
    layer group."""


@dataclass
class _Update:
    """What is known of an update on this rank; the numbers may still be on their way from the device."""

    number: int  # as `step` in metrics.csv: the first is 1
    rate: float = 0.0
    batches: list[Batch] = field(default_factory=list)
    keys: list[tuple[int, ...]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    norms: Tensor | None = None  # of each parameter's gradient
    parameters: list[nn.Parameter] = field(default_factory=list)
    reading: Reading | None = None  # whether it was left out, the gradient's norm, the losses


class SkipNonFinite(Callback):
    """Leaves out bad updates on all ranks alike, without making the host wait for a GPU.

    Bad is an update with a loss that is not finite on any rank, or with a gradient that is not finite. The device
    learns it before the optimiser steps, and steps or does not; then it puts the buffers back, which the forward pass
    has changed. Weights, moments, buffers and the average of `EMA` are then what they were, and the run goes on with
    the next images. On a GPU the host learns it an update later, before the next step: the numbers have long arrived.

    With float16's loss scaling gradients that are not finite are a part of finding the scale: the scaler leaves those
    updates out itself, and they do not count here. A loss that is not finite does.

    Before an epoch ends and before any checkpoint is written, all that is on its way is looked at; at an epoch's end so
    are the weights and the validation loss (within an epoch the writer of a checkpoint looks at its weights). All ranks
    stop together, rank 0 tells.

    Args:
        max_skipped: most updates in a row that are left out; 0 stops at the first.
        folder: of the run, for the files that say what happened.
        last_checkpoint: the file that holds the last good weights, once one is written.
    """

    def __init__(self, max_skipped: int, folder: Path, last_checkpoint: Path) -> None:
        self.max_skipped = max_skipped
        self.folder = folder
        self.last_checkpoint = last_checkpoint
        self.in_a_row = 0
        self.in_all = 0
        self._asynchronous = False
        self._bad: Tensor | None = None
        self._now: _Update | None = None
        self._pending: _Update | None = None

    def state_dict(self) -> dict[str, Any]:
        """How many were left out, with all that is on its way looked at."""
        self.settle()
        return {"in_a_row": self.in_a_row, "in_all": self.in_all}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.in_a_row, self.in_all = state_dict["in_a_row"], state_dict["in_all"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is on its device, and a checkpoint's content in it."""
        model = pl_module.model
        assert isinstance(model, nn.Module)
        self._trainer, self._module, self._model = trainer, pl_module, model
        self._buffers = BuffersBefore(model)
        self._asynchronous = pl_module.device.type != "cpu"
        self._now = self._pending = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep what the update begins with."""
        key = pl_module.step_key(batch_idx)  # type: ignore[operator]
        if self._now is None:
            self._buffers.keep()
            self._now = _Update(trainer.global_step + 1)
            self._bad = torch.zeros((), device=pl_module.device)
        self._now.batches.append(batch)
        self._now.keys.append(tuple(key))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note on the device whether this loss is finite."""
        assert self._bad is not None
        self._bad.masked_fill_(~torch.isfinite(loss.detach()), 1.0)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the step depend on the losses of all ranks; `TrainingModule` adds the gradient, which they share."""
        self.settle()  # the update before, while the weights still are what they were then
        assert self._now is not None
        assert self._bad is not None
        if trainer.world_size > 1:
            torch.distributed.all_reduce(self._bad, torch.distributed.ReduceOp.MAX)
        leave_out_where(optimizer, self._bad)
        self._now.rate = float(optimizer.param_groups[0]["lr"])
        self._now.parameters = parameters_with_gradient(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """After a step: put the buffers back if it was none. This runs before the callbacks that average or save."""
        now, bad = self._now, left_out(trainer.optimizers[0])
        assert now is not None
        now.losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if trainer.global_step < now.number:
            return
        assert bad is not None
        norms = pl_module.gradient_norms
        assert isinstance(norms, Tensor)
        now.norms = norms
        now.reading = Reading(torch.stack([bad, torch.linalg.vector_norm(norms), *now.losses]))
        self._pending, self._now = now, None
        if self._asynchronous:
            self._buffers.put_back_where(bad)
            return
        if bad:
            self._buffers.put_back()
        self.settle()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let no epoch end over a fault: this hook runs before those that save."""
        self.settle()
        weights = [value for value in pl_module.state_dict().values() if value.is_floating_point()]
        val_loss = trainer.callback_metrics.get("val/loss")
        spoilt = not torch.stack(torch._foreach_norm(weights)).isfinite().all()
        spoilt = spoilt or (val_loss is not None and not torch.isfinite(val_loss))
        if not trainer.strategy.reduce_boolean_decision(spoilt, all=False):
            return
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        skipped = f"; {self.in_all} updates were left out until here" if self.in_all else ""
        what = f"weights or validation loss are no longer finite after update {trainer.global_step}"
        self._raise(f"{what} (learning rate {rate:.4g}){skipped}")

    def settle(self) -> None:
        """Look at the update that is on its way, if one is.

        Raises:
            NonFiniteError: it is one too many in a row.
        """
        seen, self._pending = self._pending, None
        if seen is None:
            return
        assert seen.reading is not None
        bad, norm, *losses = seen.reading.values()
        if not bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.in_all += 1
        loss = sum(losses) / len(losses)
        if self.in_a_row > self.max_skipped:
            self._stop(seen, loss, norm)
        if self.in_all <= LINES:
            last = "; later ones are counted, not told" if self.in_all == LINES else ""
            tell(
                self._trainer,
                f"update {seen.number} left out: loss {loss:.4g}, gradient norm {norm:.4g}, learning rate "
                f"{seen.rate:.3e} ({self.in_a_row} in a row, at most {self.max_skipped}; {self.in_all} in all{last})",
            )

    def _stop(self, seen: _Update, loss: float, norm: float) -> None:
        """Write down this update where it went wrong, and stop."""
        assert seen.reading is not None
        is_mine = not all(map(math.isfinite, seen.reading.values()[2:]))
        faults = self._module.all_gather(torch.tensor(float(is_mine), device=self._module.device))
        assert isinstance(faults, Tensor)
        ranks = faults.flatten().nonzero().flatten().tolist() or [0]
        norms = self._norms_by_group(seen)
        refused = self._write(seen, norms, norm) if self._trainer.global_rank in ranks else ""
        self._trainer.strategy.barrier()  # rank 0's end would end the others while they write
        if not math.isfinite(loss):
            what = f"the loss became {loss}"
        elif faults.any():
            what = f"the loss became not finite on rank {ranks[0]}"
        else:
            what = f"the norm of the gradient became {norm}, with a loss of {loss:.4g},"
        row = f": one more in a row than callback.guard.max_skipped={self.max_skipped}" if self.max_skipped else ""
        files = [self.folder / f"nonfinite_update_{seen.number}_rank{rank}.pt" for rank in ranks]
        written = "\n".join(f"  python -m fat_train replay file={file}" for file in files)
        self._raise(
            f"{what} at update {seen.number} (learning rate {seen.rate:.4g}){row}",
            f"Gradient norms by layer group:\n{norm_table(norms)}",
            refused or f"Its batch and the weights before it are kept; to compute it again:\n{written}",
        )

    def _norms_by_group(self, seen: _Update) -> dict[str, float]:
        assert seen.norms is not None
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        norms = {names[id(p)]: norm for p, norm in zip(seen.parameters, seen.norms.tolist(), strict=True)}
        return by_layer_group((name, norms[name]) for name in names.values() if name in norms)

    def _write(self, seen: _Update, norms: dict[str, float], norm: float) -> str:
        """Write the file of this rank; returns why there is none."""
        assert seen.reading is not None
        losses = seen.reading.values()[2:]
        faulty = [n for n, loss in enumerate(losses) if not math.isfinite(loss)] or range(len(losses))
        update = FaultyUpdate(
            update=seen.number,
            rank=self._trainer.global_rank,
            world_size=self._trainer.world_size,
            batches=[{name: part.cpu() for name, part in seen.batches[n]._asdict().items()} for n in faulty],
            keys=[dict(zip(KEY, seen.keys[n], strict=True)) for n in faulty],
            losses=[losses[n] for n in faulty],
            state_dict={name: value.cpu() for name, value in (self._model.state_dict() | self._buffers.kept()).items()},
            gradient_norm=norm,
            gradient_norms=norms,
            rate=seen.rate,
            fat_train=self._module.provenance,  # type: ignore[arg-type]
        )
        try:
            update.save(self.folder)
        except (OSError, RuntimeError) as error:
            return f"Its batch could not be written into {self.folder}: {error}"
        return ""

    def _raise(self, what: str, *more: str) -> None:
        if not self._trainer.is_global_zero:
            raise NonFiniteError("stopped together with rank 0, which says why")
        kept = (
            f"The last good checkpoint is {self.last_checkpoint}"
            if self.last_checkpoint.exists()
            else "No checkpoint was written yet"
        )
        raise NonFiniteError(
            "\n".join([f"{what}.", *more, kept])
            + ". Usual ways out: a lower optim.base_lr, a longer schedule.warmup_epochs, "
            "trainer.precision=bf16-mixed in place of 16-mixed, a smaller optim.clip_grad_norm."
        )
