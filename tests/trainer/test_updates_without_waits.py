"""Between two rows of metrics.csv nothing in an update asks the device for a number: on a GPU the host would wait."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fat_train.callback.ema import EMAConfig
from fat_train.callback.preemption import LeaveRequest
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.command.assemble import build_training, open_run, plan_of
from fat_train.config.compose import compose
from fat_train.config.run import plain
from fat_train.trainer.build import build_trainer

WORDS = [
    "model=fat_nano", "data=synthetic", "data.backend=torch", "data.image_px=32",
    "data.eval_resize_px=32", "data.num_images=160",
    "data.num_val_images=16", "data.num_classes=4", "data.num_workers=1", "model.drop_path_rate=0.2",
    "augment.mix_mode=elem", "trainer.global_batch=16", "trainer.max_batch_per_device=8", "schedule.epochs=1",
    "schedule.warmup_epochs=0", "trainer.log_every_n_steps=4",
]  # fmt: skip
ALLOWED = {
    ("device.py", "_erase_on_cpu"),  # rectangles in the CPU's own memory; on a GPU they become a mask
    ("epoch_meter.py", "values"),  # of a `Reading`: numbers that have arrived on the host
    ("finite.py", "on_train_batch_end"),  # on a CPU the answer is there; on a GPU `put_back_where` takes its place
    ("ema.py", "on_train_batch_end"),  # the same, with `update_unless`
}
"""Where a value is read on a CPU and not on a GPU."""
FIRST, LAST = 4, 15
"""Micro-batches that are watched: updates 3 to 8 of 10."""


class Waits(TorchFunctionMode):
    """Notes who asks a tensor for its values."""

    ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.ASKING:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "torch/overrides" not in frame.filename]
            self.places.add((Path(frames[-1].filename).name, frames[-1].name))
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Notes what torch's own code asks for, below Python."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in self.ASKING:
            # those that the other watch sees too are told by their own place
            frame = next(
                f
                for f in reversed(traceback.extract_stack()[:-1])
                if "torch/" not in f.filename and f.filename != __file__
            )
            self.places.add((Path(frame.filename).name, frame.name))
        return func(*args, **(kwargs or {}))


class During(Callback):
    """Enters contexts before the first watched micro-batch and leaves them after the last one's other callbacks."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        self.contexts = contexts
        self.watched = 0
        self._stack = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == FIRST:
            for context in self.contexts:
                self._stack.enter_context(context)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.watched += 1
        if self.watched == LAST + 1:
            self._stack.close()


def train(folder: Path, during: During, *words: str) -> None:
    """A run with everything beside it: guards, average, rows, display, checkpoints."""
    config, source = open_run(plain(compose("train", [*WORDS, *words, f"folder={folder}"])))
    plan = plan_of(config, source)
    assert plan.accumulate == 2
    run = RunFolder(folder)
    with LeaveRequest(config.callback.preemption) as request:
        callbacks = replace(config.callback, ema=EMAConfig(decay=0.9)).build(
            folder=run,
            request=request,
            images_per_update=plan.global_batch,
            steps_per_epoch=plan.steps_per_epoch,
            epochs=1,
            log_every_n_steps=100,
            val_every_n_epochs=1,
        )
        module, loaders = build_training(config, source, plan, provenance={})
        trainer = build_trainer(
            config.trainer,
            folder=folder,
            epochs=1,
            accumulate=plan.accumulate,
            clip_grad_norm=config.optim.clip_grad_norm,
            callbacks=[*callbacks, during],
            loggers=[],
        )
        trainer.fit(module, datamodule=loaders)
    assert trainer.global_step == 10
    assert during.watched == 20


def test_an_update_reads_no_value_of_a_tensor_on_the_host(tmp_path: Path) -> None:
    python, kernels = Waits(), Kernels()
    train(tmp_path, During(python, kernels), "trainer.accelerator=cpu")
    assert python.places, "on a CPU some are read: the watch works"
    assert python.places - ALLOWED == set()
    assert kernels.places - ALLOWED == set()


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", ["off", "default"])
def test_the_host_waits_for_nothing_within_updates_on_a_gpu(compiled: str, tmp_path: Path) -> None:
    """torch raises where one of its calls would make the host wait for the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    @contextmanager
    def forbidden() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    train(tmp_path, During(forbidden()), "trainer.accelerator=gpu", f"trainer.compile={compiled}", "data.backend=torch")
