"""An update is the same however the global batch is cut, clipped once, at the rate of its own step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from fat_train.augment.policy import AugmentConfig
from fat_train.callback.finite import NonFiniteError, SkipNonFinite
from fat_train.loss.cross_entropy import CrossEntropyConfig
from fat_train.optim.adamw import AdamWConfig
from fat_train.schedule.cosine import CosineConfig
from fat_train.task.classification import Classification
from fat_train.trainer.build import TrainerConfig, build_trainer
from fat_train.trainer.module import TrainingModule
from fat_train.trainer.plan import plan_run
from fat_train.types import Batch

UPDATES, GLOBAL_BATCH = 3, 8
SCHEDULE = CosineConfig(epochs=1, warmup_epochs=0)
PLAIN = AugmentConfig(auto_augment=None, erase_prob=0.0, mixup_alpha=0.0, cutmix_alpha=0.0)


def micro_batches(size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (UPDATES * GLOBAL_BATCH, 4, 4, 3), dtype=torch.uint8, generator=generator)
    targets = torch.randint(5, (len(images),), generator=generator)
    boxes = torch.zeros(len(images), 0, 4, dtype=torch.int64)
    whole = Batch(images, targets, torch.arange(len(images)), boxes)
    return [Batch(*parts) for parts in zip(*(part.split(size) for part in whole), strict=True)]


def weights_after(
    size: int,
    clip_grad_norm: float,
    folder: Path,
    *,
    callbacks: Sequence[Callback] = (),
    precision: MixedPrecision | None = None,
    std: float = 0.5,
) -> torch.Tensor:
    """Train a model without BatchNorm on `UPDATES` global batches, cut into micro-batches of `size`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    optim = AdamWConfig(base_lr=0.1, lr_per_images=GLOBAL_BATCH, clip_grad_norm=clip_grad_norm)
    config = TrainerConfig(accelerator="cpu", global_batch=GLOBAL_BATCH, max_batch_per_device=GLOBAL_BATCH)
    plan = plan_run(config, optim, SCHEDULE, train_images=UPDATES * GLOBAL_BATCH)
    plan = replace(plan, accumulate=GLOBAL_BATCH // size, batch_per_device=size)
    task = Classification(model, CrossEntropyConfig().build(), PLAIN, (0.5,) * 3, (std,) * 3)
    module = TrainingModule(task, optim, SCHEDULE, plan, seed=0, provenance={})
    trainer = build_trainer(
        config,
        folder=folder,
        epochs=1,
        accumulate=plan.accumulate,
        clip_grad_norm=clip_grad_norm,
        callbacks=list(callbacks),
        loggers=[],
        max_val_batches=0,
    )
    if precision is not None:
        trainer.strategy.precision_plugin = precision
    loader = DataLoader(micro_batches(size), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, loader)
    assert trainer.global_step == UPDATES
    return model[1].weight.detach()


@pytest.mark.parametrize("clip_grad_norm", [0.0, 1e-3], ids=["unclipped", "tightly clipped"])
def test_accumulated_micro_batches_make_the_updates_of_whole_batches(clip_grad_norm: float, tmp_path: Path) -> None:
    """Clipping each micro-batch, or forgetting one, would give other weights."""
    whole = weights_after(GLOBAL_BATCH, clip_grad_norm, tmp_path)
    parts = weights_after(2, clip_grad_norm, tmp_path)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_clipping_is_applied(tmp_path: Path) -> None:
    """Adam's step hardly feels a gradient's scale, except against its eps: a tiny norm makes tiny steps."""
    start = weights_after(GLOBAL_BATCH, 1e-12, tmp_path)
    free = weights_after(GLOBAL_BATCH, 0.0, tmp_path)
    assert not torch.allclose(start, free, atol=1e-2)


class HalfOnCpu(MixedPrecision):
    """float16 with loss scaling, which the command line leaves to GPUs: the scaler's part is the same here."""

    def __init__(self, init_scale: float) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def test_gradients_that_loss_scaling_drives_to_infinity_are_no_fault(tmp_path: Path) -> None:
    """With a scale of 2**40 each gradient overflows: the scaler leaves the updates out, the guard that would stop at
    the first says nothing."""
    guard = SkipNonFinite(0, tmp_path, tmp_path / "last.ckpt")
    scaled = weights_after(GLOBAL_BATCH, 5.0, tmp_path, callbacks=[guard], precision=HalfOnCpu(2.0**40))
    assert guard.in_all == 0
    torch.manual_seed(0)
    assert torch.equal(scaled, nn.Sequential(nn.Flatten(), nn.Linear(48, 5))[1].weight)


def test_a_scale_that_fits_trains(tmp_path: Path) -> None:
    guard = SkipNonFinite(0, tmp_path, tmp_path / "last.ckpt")
    scaled = weights_after(GLOBAL_BATCH, 5.0, tmp_path, callbacks=[guard], precision=HalfOnCpu(2.0**10))
    torch.testing.assert_close(scaled, weights_after(GLOBAL_BATCH, 5.0, tmp_path), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", [None, HalfOnCpu(2.0**10)], ids=["float32", "float16 with loss scaling"])
def test_a_loss_that_is_not_finite_is_a_fault_in_any_precision(tmp_path: Path, precision: HalfOnCpu | None) -> None:
    guard = SkipNonFinite(0, tmp_path, tmp_path / "last.ckpt")
    with pytest.raises(NonFiniteError, match="the loss became nan at update 1 "):
        weights_after(GLOBAL_BATCH, 5.0, tmp_path, callbacks=[guard], precision=precision, std=float("nan"))
    assert list(tmp_path.glob("nonfinite_update_1_rank0.pt"))
