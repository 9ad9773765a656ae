"""The root of a run's configuration: one typed object a group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fat_train.augment.policy import AugmentConfig
from fat_train.callback.build import CallbackConfig
from fat_train.config.resolve import refuse_unknown, resolve
from fat_train.data.datamodule import DigitsDataConfig, FolderDataConfig, SyntheticDataConfig
from fat_train.logger.build import LoggerConfig
from fat_train.loss.cross_entropy import CrossEntropyConfig
from fat_train.model.backbone import ModelConfig
from fat_train.op.choice import OpConfig
from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.task.classification import ClassificationConfig
from fat_train.trainer.build import TrainerConfig
from fat_train.types import UserError, one_of

GROUPS = (
    "model",
    "data",
    "augment",
    "loss",
    "optim",
    "schedule",
    "task",
    "callback",
    "logger",
    "trainer",
    "op",
    "debug",
)
RESUME = ("auto", "never")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class DebugConfig:
    """Short cuts for finding faults; all off in a real run."""

    max_steps_per_epoch: int = 0
    """Updates after which an epoch ends; 0 runs it whole."""
    max_val_batches: int = 0
    """Batches after which a validation ends; 0 runs it whole."""
    overfit_images: int = 0
    """Train and validate on the first so many training images alone; 0 takes the data set."""
    profile: bool = False
    """Write a trace of the run into the run's folder."""

    def __post_init__(self) -> None:
        for name in ("max_steps_per_epoch", "max_val_batches", "overfit_images"):
            if getattr(self, name) < 0:
                raise UserError(f"debug.{name} must not be negative; got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What stands at the root, beside the groups."""

    name: str | None = None
    """Name of the run, and of its folder; null makes one from model and data."""
    folder: str = "runs"
    """Where the runs' folders are."""
    resume: str = "auto"
    """auto goes on from the run's last checkpoint where there is one; never starts afresh."""
    overwrite: bool = False
    """With resume=never: delete the checkpoints that are in the run's folder."""
    seed: int = 0
    """Of order, augmentation, initialisation and drop path."""

    def __post_init__(self) -> None:
        one_of("resume", self.resume, RESUME)
        if self.name is not None and (not self.name or "/" in self.name or self.name.startswith(".")):
            raise UserError(f"name must be a plain folder name; got {self.name!r}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2**32); got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole training run, typed and checked."""

    run: RunSettings
    model: ModelConfig
    data: FolderDataConfig | DigitsDataConfig | SyntheticDataConfig
    augment: AugmentConfig
    loss: CrossEntropyConfig
    optim: AdamWConfig
    schedule: CosineConfig
    task: ClassificationConfig
    callback: CallbackConfig
    logger: LoggerConfig
    trainer: TrainerConfig
    op: OpConfig
    debug: DebugConfig

    @property
    def name(self) -> str:
        """The run's name, given or made."""
        return self.run.name or f"{self.model.name}_{self.data.name}"

    @property
    def root(self) -> Path:
        """The run's folder. Debugging has a place of its own, where it cannot replace a real run of the same name."""
        folder = Path(self.run.folder).expanduser()
        return folder / self.name if self.debug == DebugConfig() else folder / "debug" / self.name


class Problems:
    """Collects what is wrong, so that a user mends everything at once instead of one thing a try."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def catch(self, action: Callable[[], T]) -> T | None:
        """Run `action`; a `UserError` is kept for later, and None comes back."""
        try:
            return action()
        except UserError as error:
            self._messages.append(str(error))
            return None

    def raise_if_any(self) -> None:
        """Speak.

        Raises:
            UserError: one message with everything that was caught.
        """
        if len(self._messages) == 1:
            raise UserError(self._messages[0])
        if self._messages:
            items = "\n".join(f"{i}. " + text.replace("\n", "\n   ") for i, text in enumerate(self._messages, 1))
            raise UserError(f"{len(self._messages)} things to mend first:\n{items}")


def plain(tree: DictConfig) -> dict[str, Any]:
    """The tree as plain values, interpolations filled in.

    Raises:
        UserError: an interpolation that leads nowhere.
    """
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def resolve_run(values: Mapping[str, Any], problems: Problems) -> RunConfig | None:
    """Type and check a plain tree; None where something was wrong, which `problems` then holds."""
    settings = [field.name for field in dataclasses.fields(RunSettings)]
    problems.catch(lambda: refuse_unknown(values, (*settings, *GROUPS, "experiment"), where=""))
    classes = {"op": OpConfig, "debug": DebugConfig}
    resolved: dict[str, Any] = {
        group: problems.catch(lambda group=group: resolve(values.get(group, {}), classes.get(group), where=group))  # type: ignore[misc]
        for group in GROUPS
    }
    own = {name: values[name] for name in settings if name in values}
    run = problems.catch(lambda: resolve(own, RunSettings, where=""))
    if run is None or None in resolved.values():
        return None
    return RunConfig(run=run, **resolved)
