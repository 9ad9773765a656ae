"""replay: compute an update again at which a run stopped, and say where the first number is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from fat_train.callback.faulty_update import FaultyUpdate, gradient_norms, norm_table
from fat_train.checkpoint.weights import apply_state_dict, read_checkpoint
from fat_train.command.assemble import build_task, device_of
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import Problems, RunConfig, plain, resolve_run
from fat_train.task.classification import Classification
from fat_train.task.step import StepKey
from fat_train.trainer.build import ACCELERATORS
from fat_train.types import Batch, MissingPathError, one_of, some

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What stands in `conf/replay.yaml`."""

    file: str
    """A `nonfinite_update_<update>_rank<rank>.pt` that a run left in its folder when it stopped."""
    accelerator: str = "auto"
    """auto takes a GPU where there is one, else the CPU; or cpu, gpu, mps."""

    def __post_init__(self) -> None:
        one_of("accelerator", self.accelerator, ACCELERATORS)


def run(tree: DictConfig) -> list[float]:
    """Compute it again; returns the losses of its micro-batches.

    Raises:
        UserError: no such file, another kind of file, or a device that is not there.
    """
    settings = resolve(plain(tree), ReplaySettings, where="")
    path = Path(settings.file).expanduser()
    if not path.is_file():
        raise MissingPathError(f"file={path}: no such file")
    update = FaultyUpdate.of(read_checkpoint(path), source=f"file={path}")
    config = _config(update, settings.accelerator)
    device = device_of(config)
    task = build_task(config, update.fat_train["num_classes"])
    apply_state_dict(task.model, update.state_dict, source=str(path))
    task.model.to(device).train()
    about = f"update {update.update}, rank {update.rank} of {update.world_size}"
    say(f"file           {path} ({update.fat_train['model']}, {about})")
    say(f"computed       on {device.type} with trainer.precision={config.trainer.precision}")
    for note in _differences(update, config):
        say(f"               {note}")
    spoilt = [name for name, value in task.model.state_dict().items() if not _is_finite(value)]
    largest = _largest(_tensors(list(task.model.state_dict().values())))
    say(f"weights        {'not finite: ' + some(spoilt) if spoilt else f'finite, up to {largest:.4g}'}")
    return [_replay(update, number, task, config, device) for number in range(len(update.batches))]


def _config(update: FaultyUpdate, accelerator: str) -> RunConfig:
    """The run's own configuration on one device of this machine, without what would hide single modules."""
    problems = Problems()
    config = resolve_run({**update.fat_train["config"], "debug": {}}, problems)
    problems.raise_if_any()
    assert config is not None
    trainer = replace(
        config.trainer, accelerator=accelerator, devices=1, num_nodes=1, compile="off", grad_checkpointing=False
    )
    if trainer.kind != "cpu":
        trainer.refuse_impossible()  # a CPU computes 16-mixed as well, for this one batch
    return replace(config, trainer=trainer)


def _differences(update: FaultyUpdate, config: RunConfig) -> list[str]:
    """What of the run cannot be computed again by one process."""
    notes = []
    was = resolve_run({**update.fat_train["config"], "debug": {}}, Problems())
    if update.world_size > 1:
        notes.append("gradients are of this rank's images alone; the run took the mean over the ranks")
    if update.world_size > 1 and was is not None and was.trainer.accelerator != "cpu":
        notes.append("so are BatchNorm's statistics, which GPUs share in a run")
    if config.trainer.precision == "16-mixed":
        notes.append("gradients are without the run's loss scaling")
    return notes


def _replay(update: FaultyUpdate, number: int, task: Classification, config: RunConfig, device: torch.device) -> float:
    key = StepKey(**update.keys[number])
    batch = Batch(*(part.to(device) for part in update.batch(number)))
    task.model.zero_grad(set_to_none=True)
    torch.manual_seed(key.torch_seed())
    dtype = AUTOCAST.get(config.trainer.precision)
    with _first_fault(task.model) as found:
        with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = task.train_step(batch, key).loss
        loss.backward()
    say(f"micro-batch    {key.micro_batch}: {len(batch.targets)} images, rows {_some_rows(batch)} of the training list")
    say(f"loss           {loss.item()} (in the run {update.losses[number]})")
    in_loss = "" if torch.isfinite(loss) else "; the loss is not"
    say(f"forward        {found.get('forward', 'the output of each module is finite' + in_loss)}")
    say(f"backward       {found.get('backward', 'the gradient at each output is finite')}")
    say(f"gradient norms by layer group, before clipping:\n{norm_table(gradient_norms(task.model))}")
    return loss.item()


def _some_rows(batch: Batch) -> str:
    rows = batch.indices.tolist()
    return ", ".join(map(str, rows[:4])) + (", …" if len(rows) > 4 else "")


@contextmanager
def _first_fault(model: nn.Module) -> Iterator[dict[str, str]]:
    """Note the first output, and then the first gradient of an output, that is not finite."""
    found: dict[str, str] = {}

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        for tensor in _tensors(output):
            if not _is_finite(tensor) and "forward" not in found:
                largest = _largest(_tensors(inputs))
                found["forward"] = (
                    f"the output of {name or 'the model'} ({type(module).__name__}) is the first that is not finite; "
                    + (f"its input is, up to {largest:.4g}" if math.isfinite(largest) else "neither is its input")
                )
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: look_back(name, module, gradient))

    def look_back(name: str, module: nn.Module, gradient: Tensor) -> None:
        if "backward" not in found and not _is_finite(gradient):
            found["backward"] = (
                f"the gradient at the output of {name or 'the model'} ({type(module).__name__}) is the first that is "
                "not finite"
            )

    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, module, inputs, output))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """The floating tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, tuple | list) else []


def _largest(tensors: list[Tensor]) -> float:
    """The largest magnitude; not finite where one is not."""
    largest = [value.detach().abs().max() for value in tensors if value.numel()]
    return torch.stack(largest).max().item() if largest else 0.0  # torch's max hands a NaN on, Python's does not


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())
