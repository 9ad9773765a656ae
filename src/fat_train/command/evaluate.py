"""evaluate: top-1 and top-5 of a checkpoint, each validation image counted once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fat_train.checkpoint.weights import apply_state_dict, read_state_dict
from fat_train.command.assemble import build_task, device_of, refuse_idle_ranks
from fat_train.command.from_checkpoint import about_run
from fat_train.command.say import say
from fat_train.config.resolve import refuse_unknown, resolve
from fat_train.config.run import GROUPS, Problems, RunConfig, plain, resolve_run
from fat_train.data.datamodule import DataSource
from fat_train.model.backbone import Backbone
from fat_train.model.compiled import OFF
from fat_train.trainer.build import build_trainer
from fat_train.trainer.compiler import AUTO
from fat_train.trainer.loaders import RunLoaders
from fat_train.trainer.module import ValidationModule
from fat_train.types import UserError, one_of

WEIGHTS = ("raw", "ema", "both")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What stands at the root of `conf/evaluate.yaml`, beside data and trainer."""

    checkpoint: str
    """File with the weights and, beside them, the configuration of their run."""
    weights: str = "raw"
    """raw, ema, or both."""
    batch_size: int = 128
    """Images that one device holds at once; the result does not depend on it."""
    reparameterize: bool = False
    """Evaluate what `model.reparameterize()` makes of the model: faster, and equal but for rounding."""

    def __post_init__(self) -> None:
        one_of("weights", self.weights, WEIGHTS)
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1; got {self.batch_size}")


def run(tree: DictConfig) -> list[dict[str, Any]]:
    """Evaluate; returns one row of numbers for each kind of weights.

    Raises:
        UserError: no such checkpoint, one without its configuration, or a data set with other classes.
    """
    values = plain(tree)
    settings = resolve({k: v for k, v in values.items() if k not in GROUPS}, EvaluateSettings, where="")
    checkpoint = Path(settings.checkpoint).expanduser()
    about = about_run(checkpoint)
    config, source = _open(values, about)
    _refuse_other_classes(about, source, checkpoint)
    say(f"checkpoint     {checkpoint} ({about['model']}, {about['num_classes']} classes)")
    say(f"data           {source.name}: {len(source.val):,} images of {len(source.val.classes):,} classes")
    for note in source.notes:
        say(f"               {note}")
    if source.held_out:
        _say_what_was_held_out(about, source)
    kinds = ["raw", "ema"] if settings.weights == "both" else [settings.weights]
    return [_evaluate(kind, checkpoint, config, source, settings) for kind in kinds]


def _open(values: dict[str, Any], about: dict[str, Any]) -> tuple[RunConfig, DataSource]:
    """The checkpoint's own configuration with this command's data and trainer laid over it."""
    given = values.get("data", {})
    saved = dict(about["config"])
    data = given if "_target_" in given else OmegaConf.to_container(OmegaConf.merge(saved["data"], given))
    refuse_unknown(values, (*EvaluateSettings.__dataclass_fields__, "data", "trainer", "op"), where="")
    problems = Problems()
    config = resolve_run(
        {**saved, "data": data, "trainer": values["trainer"], "op": values["op"], "debug": {}}, problems
    )
    problems.raise_if_any()
    assert config is not None
    problems.catch(config.trainer.refuse_impossible)
    device, op = device_of(config).type, config.op
    problems.catch(lambda: op.refuse_impossible(device))
    source = problems.catch(config.data.open_val)
    problems.raise_if_any()
    assert source is not None
    refuse_idle_ranks(config.trainer, source)
    if config.trainer.compile == AUTO:  # one pass over the images does not pay for it
        config = replace(config, trainer=replace(config.trainer, compile=OFF))
    return config, source


def _refuse_other_classes(about: dict[str, Any], source: DataSource, checkpoint: Path) -> None:
    if about["num_classes"] != len(source.val.classes):
        raise UserError(
            f"{checkpoint} has {about['num_classes']} classes, the data set has {len(source.val.classes)}: "
            "its results would mean nothing"
        )
    if about["classes"] != list(source.val.classes):
        pairs = zip(about["classes"], source.val.classes, strict=True)
        old, new = next((old, new) for old, new in pairs if old != new)
        say(f"warning        the classes' names differ from those in training (first: {old} there, {new} here)")


def _say_what_was_held_out(about: dict[str, Any], source: DataSource) -> None:
    say("               data.holdout=0 evaluates on val/")
    if about["data"]["val"] != source.val.fingerprint:
        say("warning        these are not the images that were held out in training: it may have seen some of them")


def _evaluate(
    kind: str, checkpoint: Path, config: RunConfig, source: DataSource, settings: EvaluateSettings
) -> dict[str, Any]:
    task = build_task(config, source.num_classes)
    apply_state_dict(task.model, read_state_dict(checkpoint, kind), source=str(checkpoint))
    if settings.reparameterize:
        assert isinstance(task.model, Backbone)
        task.model.reparameterize()
    trainer = build_trainer(
        config.trainer, folder=checkpoint.parent, epochs=1, accumulate=1, clip_grad_norm=0.0, callbacks=[], loggers=[]
    )
    loaders = RunLoaders(
        config.data, source, config.augment, plan=None, batch_per_device=settings.batch_size, seed=config.run.seed
    )
    with torch.inference_mode():
        trainer.validate(ValidationModule(task), datamodule=loaders, verbose=False)
    result = {name: value.item() for name, value in trainer.callback_metrics.items()}
    count = round(result["val/count"])
    say(
        f"{kind:<15}top-1 {result['val/top1']:.3f} %   top-5 {result['val/top5']:.3f} %   "
        f"loss {result['val/loss']:.4f}   {count:,} images"
    )
    return {"weights": kind, **result}
