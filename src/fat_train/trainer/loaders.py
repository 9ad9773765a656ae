"""The loaders of a run, in Lightning's clothes, always at the place where the run is."""

from __future__ import annotations

from collections.abc import Iterator

from pytorch_lightning import LightningDataModule, Trainer

from fat_train.augment.policy import AugmentConfig
from fat_train.data.datamodule import DataConfig, DataSource, build_loader
from fat_train.data.loader import Loader
from fat_train.trainer.plan import RunPlan
from fat_train.types import Batch


class RunLoaders(LightningDataModule):
    """Builds each rank's loaders once the ranks are known.

    Args:
        config: the data set's settings.
        source: its lists of files.
        augment: the recipe.
        plan: batch, accumulation, and updates an epoch; None where only validation will run.
        batch_per_device: images of a validation batch.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        config: DataConfig,
        source: DataSource,
        augment: AugmentConfig,
        *,
        plan: RunPlan | None,
        batch_per_device: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.config = config
        self.source = source
        self.augment = augment
        self.plan = plan
        self.batch_per_device = batch_per_device
        self.seed = seed

    def train_dataloader(self) -> AtRunPosition:
        """This rank's share of each update."""
        assert self.plan is not None
        assert self.trainer is not None
        return AtRunPosition(
            self._build("train", self.plan.batch_per_device, self.plan.accumulate), self.trainer, self.plan
        )

    def val_dataloader(self) -> Loader:
        """This rank's share of the validation images, each image on exactly one rank."""
        return self._build("val", self.batch_per_device, accumulate=1)

    def _build(self, split: str, batch_per_device: int, accumulate: int) -> Loader:
        trainer = self.trainer
        assert trainer is not None
        return build_loader(
            self.config,
            self.source.train if split == "train" else self.source.val,
            split,
            self.augment,
            batch_per_device=batch_per_device,
            accumulate=accumulate,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            local_world_size=trainer.num_devices,
            seed=self.seed,
            device=trainer.strategy.root_device,
        )


class AtRunPosition:
    """A training loader that starts where the run is, however the run got there.

    The place follows from the number of finished updates alone, and that is part of every checkpoint; so neither
    Lightning's own record of the loader nor the order in which its hooks are called matters.
    """

    def __init__(self, loader: Loader, trainer: Trainer, plan: RunPlan) -> None:
        self.loader = loader
        self.trainer = trainer
        self.plan = plan

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing here runs before the first batch is asked for, when Lightning has restored its counters.
        epoch, step = divmod(self.trainer.global_step, self.plan.steps_per_epoch)
        self.loader.load_state_dict({"epoch": epoch, "batch": step * self.plan.accumulate})
        yield from self.loader

    def state_dict(self) -> dict[str, int]:
        """Told to Lightning so that it takes the loader for one that can go on within an epoch, as it can."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing to restore: see the class."""
