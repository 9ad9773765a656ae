"""Where a run is, how fast, how long still, and how well: live on a terminal, as plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text
from torch.optim import Optimizer

from fat_train.callback.epoch_meter import EpochMeter, Reading
from fat_train.callback.pace import Pace
from fat_train.metric.record import format_duration
from fat_train.types import UserError

SEPARATOR = " · "


@dataclass(frozen=True, kw_only=True)
class ProgressConfig:
    """How a run shows where it is."""

    enabled: bool = True
    """Whether anything is shown at all."""
    refresh_s: float = 0.25
    """Seconds from one refresh of the live display to the next, on a terminal."""
    line_every_s: float = 60.0
    """Seconds from one plain line to the next where the output is no terminal (a SLURM log, a pipe)."""

    def __post_init__(self) -> None:
        for name in ("refresh_s", "line_every_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"callback.progress.{name} must be above 0 seconds; got {getattr(self, name)}")

    def build(self, *, images_per_update: int, steps_per_epoch: int, epochs: int) -> Progress | None:
        """The callback, or None where nothing is to be shown (then give the Trainer `enable_progress_bar=False`)."""
        if not self.enabled:
            return None
        return Progress(self, images_per_update=images_per_update, steps_per_epoch=steps_per_epoch, epochs=epochs)


class Progress(ProgressBar):
    """One live display on a terminal, plain lines elsewhere; one line stays for each epoch.

    Only rank 0 shows anything. Within an epoch nothing waits for the device: the loss is copied in the background a
    few times a second, and shown once it has arrived. Epochs are shown counting from 1.

    Args:
        config: how often.
        images_per_update: images of one update over all ranks (the global batch).
        steps_per_epoch: updates of one epoch.
        epochs: of the whole run; 0, as the other two, where only validation runs.
        console: where to; standard output by default.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        config: ProgressConfig,
        *,
        images_per_update: int,
        steps_per_epoch: int,
        epochs: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._config = config
        self._images_per_update = images_per_update
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._console = console or Console()
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._clock = clock
        self._meter = EpochMeter(clock)
        self._pace = Pace(clock)
        self._live: Live | None = None
        self._is_shown = True
        self._updates_done = 0
        self._batches_of_update = 0
        self._accumulate = 1
        self._lr = 0.0
        self._validation: dict[str, float] = {}
        self._best: tuple[float, int] | None = None
        self._validation_bar: tuple[int, int] | None = None
        self._validation_began = 0.0
        self._marked_at = self._shown_at = -float("inf")

    def disable(self) -> None:
        """Show nothing (every rank but 0)."""
        self._is_shown = False

    def enable(self) -> None:
        """Show again."""
        self._is_shown = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the live display."""
        if self._is_shown:
            self._console.print(*args, **({"highlight": False, "soft_wrap": not self._is_live} | kwargs))

    def state_dict(self) -> dict[str, Any]:
        """The epoch's sums and the best result. A collective, as every rank's loss is in it."""
        return {"epoch": self._meter.state_dict(), "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the run where the checkpoint left it."""
        self._meter.load_state_dict(state_dict["epoch"])
        self._best = state_dict["best"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where in the run this process begins is known now."""
        self._updates_done = trainer.global_step
        self._accumulate = trainer.accumulate_grad_batches
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        self._meter.take_up(trainer.current_epoch)
        self._mark(pl_module)
        self._start_display()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new bar; an epoch taken up in its middle does not pass here."""
        self._meter.reset(trainer.current_epoch)
        self._validation = {}
        self._mark(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The rate that this update uses."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; a few times a second, take the pace and show it."""
        ends_update = trainer.global_step > self._updates_done
        self._updates_done = trainer.global_step
        self._batches_of_update = 0 if ends_update else self._batches_of_update + 1
        self._meter.add(outputs["loss"], ends_update)
        if self._is_shown and self._clock() - self._marked_at >= self._config.refresh_s:
            self._mark(pl_module)
        self._show()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The bar becomes the validation's."""
        self._meter.pause()
        self._pace.begin_break()
        self._validation_bar = (0, int(sum(trainer.num_val_batches)))
        self._validation_began = self._clock()
        self._start_display()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch further."""
        assert self._validation_bar is not None
        done, total = self._validation_bar
        self._validation_bar = (done + 1, total)
        self._show()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep this epoch's results: between validations `callback_metrics` holds on to an earlier epoch's."""
        self._meter.unpause()
        self._validation_bar = None
        if trainer.state.fn != "fit":
            self._stop_display()
        elif not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._validation = {name: value.item() for name, value in metrics if name.startswith("val/")}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line that stays."""
        self._pace.begin_break()
        if self._meter.updates == 0:
            return
        train_loss = self._meter.mean_loss(pl_module.device)
        top1 = self._validation.get("val/top1")
        is_best = top1 is not None and (self._best is None or top1 > self._best[0])
        if top1 is not None and is_best:
            self._best = (top1, self._meter.epoch)
        self.print(self._epoch_line(train_loss, is_best), markup=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal as it was."""
        self._stop_display()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was, before the message comes."""
        self._stop_display()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._stop_display()

    @property
    def _updates_of_epoch(self) -> float:
        return self._meter.updates + self._batches_of_update / self._accumulate

    def _mark(self, pl_module: LightningModule) -> None:
        self._marked_at = self._clock()
        self._pace.mark(self._updates_of_epoch, Reading(self._meter.loss_sum(pl_module.device)))

    def _start_display(self) -> None:
        if self._is_shown and self._is_live and self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def _stop_display(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        every_s = self._config.refresh_s if self._is_live else self._config.line_every_s
        if not self._is_shown or self._clock() - self._shown_at < every_s:
            return
        self._shown_at = self._clock()
        if self._live is not None:
            self._live.update(self._picture(), refresh=True)
        else:
            self.print(SEPARATOR.join([self._position(), *self._facts()]), markup=False)

    def _position(self) -> str:
        epoch = f"epoch {self._meter.epoch + 1}/{self._epochs}" if self._epochs else ""
        if self._validation_bar is None:
            return f"{epoch}{SEPARATOR}update {self._meter.updates}/{self._steps_per_epoch}"
        done, total = self._validation_bar
        return SEPARATOR.join(filter(None, [epoch, f"validation batch {done}/{total}"]))

    def _facts(self) -> list[str]:
        if self._validation_bar is not None:
            done, total = self._validation_bar
            left_s = (self._clock() - self._validation_began) / done * (total - done)
            return [f"{format_duration(left_s)} left"]
        facts = []
        if self._pace.updates_per_s is not None:
            facts.append(f"{format_rate(self._pace.updates_per_s * self._images_per_update)} img/s")
        facts.append(f"lr {self._lr:.2e}")
        if self._pace.loss is not None:
            facts.append(f"loss {self._pace.loss:.4f}")
        if self._best is not None:
            facts.append(f"best {self._best[0]:.2f} % (epoch {self._best[1] + 1})")
        updates = (self._epochs - self._meter.epoch) * self._steps_per_epoch - self._updates_of_epoch
        run_left_s = self._pace.remaining_s(updates, self._epochs - self._meter.epoch)
        if run_left_s is not None:
            facts.append(f"{format_duration(run_left_s)} left")
        return facts

    def _picture(self) -> RenderableType:
        done, total = self._validation_bar or (self._updates_of_epoch, self._steps_per_epoch)
        line = Table.grid(padding=(0, 1), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_row(Text(self._position(), style="bold"), Bar(total=total, completed=done))
        return Group(line, Text("  " + SEPARATOR.join(self._facts()), style="cyan", no_wrap=True, overflow="ellipsis"))

    def _epoch_line(self, train_loss: float, is_best: bool) -> str:
        parts = [f"epoch {self._meter.epoch + 1}/{self._epochs}", f"train/loss {train_loss:.4f}"]
        for name in ("val/loss", "val/top1", "val/top5", "val/top1_ema", "val/top5_ema"):
            if name in self._validation:
                digits = 4 if name == "val/loss" else 2
                parts.append(f"{name} {self._validation[name]:.{digits}f}")
                parts[-1] += " (best)" if name == "val/top1" and is_best else ""
        rate = self._meter.updates * self._images_per_update / self._meter.train_s
        parts += [f"lr {self._lr:.2e}", f"{format_rate(rate)} img/s", format_duration(self._meter.elapsed_s)]
        return SEPARATOR.join(parts)


def format_rate(per_s: float) -> str:
    """A rate for people: one decimal below ten, thousands separated."""
    return f"{per_s:.1f}" if per_s < 10 else f"{per_s:,.0f}"


def tell(trainer: Trainer, text: str) -> None:
    """A line from rank 0 that stays, above the live display where there is one."""
    if isinstance(trainer.progress_bar_callback, Progress):
        trainer.progress_bar_callback.print(text, markup=False)
    elif trainer.is_global_zero:
        print(text, flush=True)
