"""The machine's side of a run: devices, precision, memory format; and the Lightning Trainer that they make."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from packaging.version import Version
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from pytorch_lightning.profilers import PyTorchProfiler
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from fat_train.checkpoint.writer import BackgroundCheckpointIO
from fat_train.trainer import compiler
from fat_train.trainer.quiet import silence
from fat_train.trainer.sync_batch_norm import SyncBatchNorms
from fat_train.types import UserError, one_of

ACCELERATORS = ("auto", "cpu", "gpu", "mps")
PATIENCE = timedelta(hours=6)
"""For a rank that is late; `callback.guard.hang_minutes` is shorter, and tells where it hangs."""
MATMUL_PRECISIONS = ("high", "highest")
PRECISIONS = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """On what, how wide and how exactly to train."""

    accelerator: str = "auto"
    """auto takes GPUs where there are any, else the CPU; or cpu, gpu, mps."""
    devices: int = 1
    """Processes a node, one a GPU; on the CPU at most one a core."""
    num_nodes: int = 1
    """Nodes of the job; under SLURM it must be the job's own number."""
    precision: str = "32"
    """32, bf16-mixed (weights and norms stay float32) or 16-mixed (with loss scaling; GPUs only)."""
    global_batch: int = 1024
    """Images an update, over all devices and accumulation; the recipe's number, whatever the machine."""
    max_batch_per_device: int = 128
    """Most images that one device holds at once; the rest of the global batch is accumulated."""
    compile: str = "auto"
    """torch.compile the model, a slower start for faster steps: auto (default on one GPU, off elsewhere), off, default,
    reduce-overhead (CUDA graphs), max-autotune (a long search), or regional (blocks alone: starts sooner)."""
    matmul_precision: str = "high"
    """Of float32 products on GPUs: high (TF32, inputs of 10 bits, several times as fast) or highest (all 23 bits)."""
    channels_last: bool = True
    """Keep activations as NHWC in memory: the faster layout for these models on GPUs and CPUs."""
    grad_checkpointing: bool = False
    """Recompute each block's activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Only deterministic kernels: on GPUs a run then repeats to the bit, more slowly. On the CPU it always does."""
    log_every_n_steps: int = 50
    """Updates between two rows of metrics.csv and of the loggers."""
    val_every_n_epochs: int = 1
    """Epochs between two validations."""

    def __post_init__(self) -> None:
        one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        one_of("trainer.precision", self.precision, PRECISIONS)
        one_of("trainer.matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        compiler.checked_word(self.compile)
        names = ("devices", "num_nodes", "global_batch", "max_batch_per_device", "log_every_n_steps")
        for name in (*names, "val_every_n_epochs"):
            if getattr(self, name) < 1:
                raise UserError(f"trainer.{name} must be at least 1; got {getattr(self, name)}")

    @property
    def kind(self) -> str:
        """cpu, gpu or mps: what `accelerator` comes to on this machine."""
        if self.accelerator != "auto":
            return self.accelerator
        if torch.cuda.is_available():
            return "gpu"
        return "mps" if torch.backends.mps.is_available() and self.devices == 1 else "cpu"

    @property
    def way_to_compile(self) -> str:
        """What `compile` comes to on this machine."""
        return compiler.way_to_compile(self.compile, self.kind, self.devices * self.num_nodes)

    def refuse_impossible(self) -> None:
        """Check the request against this machine.

        Raises:
            UserError: more devices than there are, a precision that the device does not have, or a way to compile that
                does not work here.
        """
        gpus, cores = torch.cuda.device_count(), available_cores()
        here = f"this machine has {gpus} GPU{'s' * (gpus != 1)} and {cores} CPU core{'s' * (cores != 1)}"
        limits = {"gpu": gpus, "cpu": cores, "mps": int(torch.backends.mps.is_available())}
        if self.devices > limits[self.kind]:
            instead = f"trainer.devices={limits[self.kind]}" if limits[self.kind] else "trainer.accelerator=cpu"
            raise UserError(
                f"trainer.devices={self.devices} asks for more than there are: {here}. "
                f"Give {instead}, or start the job on a machine with the GPUs"
            )
        if self.precision == "16-mixed" and self.kind == "cpu":
            raise UserError("trainer.precision=16-mixed needs a GPU; on the CPU give 32 or bf16-mixed")
        compiler.refuse_impossible(
            self.compile,
            self.kind,
            grad_checkpointing=self.grad_checkpointing,
            accumulates=self.global_batch > self.max_batch_per_device * self.devices * self.num_nodes,
        )


def available_cores() -> int:
    """CPU cores that this process may use (a job's share, not the machine's count, where the system tells)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_trainer(
    config: TrainerConfig,
    *,
    folder: Path,
    epochs: int,
    accumulate: int,
    clip_grad_norm: float,
    callbacks: list[Callback],
    loggers: list[Logger],
    max_batches: int | None = None,
    max_val_batches: int | None = None,
    profile: bool = False,
) -> Trainer:
    """The Lightning Trainer of a run, or of an evaluation.

    Args:
        config: devices and precision.
        folder: where a profile goes; nothing else is written by the Trainer itself.
        epochs: epochs of the whole run, resumed ones included.
        accumulate: micro-batches an update.
        clip_grad_norm: largest norm of the gradient, 0 for no clipping.
        callbacks: in the order in which they are to be called.
        loggers: beside `metrics.csv`, which is a callback's.
        max_batches: micro-batches after which an epoch ends early (debugging).
        max_val_batches: the same for validation.
        profile: write a trace of a few steps for chrome://tracing.
    """
    silence()
    if config.kind == "gpu":
        torch.set_float32_matmul_precision(config.matmul_precision)
        torch.backends.cudnn.allow_tf32 = config.matmul_precision != "highest"
    trainer = Trainer(
        accelerator=config.kind,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_strategy(config),
        precision=PRECISIONS[config.precision],  # type: ignore[arg-type]
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip_grad_norm or None,
        gradient_clip_algorithm="norm",
        check_val_every_n_epoch=config.val_every_n_epochs,
        limit_train_batches=max_batches,
        limit_val_batches=max_val_batches,
        log_every_n_steps=config.log_every_n_steps,
        num_sanity_val_steps=0,  # a restored loader must not be started twice
        use_distributed_sampler=False,  # our order shards by global rank
        deterministic=config.deterministic or None,
        benchmark=config.kind == "gpu" and not config.deterministic,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        default_root_dir=folder,
        callbacks=callbacks,
        logger=loggers,
        plugins=[BackgroundCheckpointIO(), *_cluster(), *_synchronised(config)],
        profiler=PyTorchProfiler(dirpath=folder, filename="profile") if profile else None,
    )
    _ask_nobody_for_signals(trainer)
    return trainer


def _ask_nobody_for_signals(trainer: Trainer) -> None:
    """Lightning from 2.5.2 on asks rank 0 before every batch whether it has received SIGTERM: a broadcast that the host
    waits for, and so a stop of the GPU's queue. Here `callback.agreement` asks without waiting."""
    loop, question = trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"
    if Version(pytorch_lightning.__version__) >= Version("2.5.2") and hasattr(loop, question):
        setattr(loop, question, lambda: None)


def _cluster() -> list[SLURMEnvironment]:
    """Under SLURM: its ranks and addresses, but not Lightning's own requeueing, which saves inside a signal handler and
    beside our checkpoints."""
    return [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []


def _synchronised(config: TrainerConfig) -> list[LayerSync]:
    """BatchNorm over all GPUs. Eager code takes torch's own: its kernels need less memory, though the host waits."""
    if config.kind != "gpu" or config.devices * config.num_nodes == 1:
        return []
    return [TorchSyncBatchNorm() if config.way_to_compile == compiler.OFF else SyncBatchNorms()]


def _strategy(config: TrainerConfig) -> Strategy | str:
    if config.devices * config.num_nodes == 1:
        return "auto"
    return DDPStrategy(gradient_as_bucket_view=True, timeout=PATIENCE, **_buffers(config.kind))


def _buffers(kind: str) -> dict[str, Any]:
    """On GPUs the ranks' buffers are equal, as BatchNorm's statistics are of all ranks and each computes them alike: no
    need to send rank 0's round before every forward pass. On CPUs DDP does; they are evaluated and saved."""
    named = "forward_sync_buffers"
    if named not in signature(DistributedDataParallel).parameters:  # torch of before 2.14
        named = "broadcast_buffers"
    return {named: False} if kind == "gpu" else {}
