"""benchmark step: where the time of a training step goes, what bounds the run, and what to change."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from rich.console import Console

from fat_train.benchmark.step import PARTS, Split, Window, loader_rate
from fat_train.benchmark.step_clock import StepClock, StopAfter, is_compiled
from fat_train.benchmark.step_plot import draw_split
from fat_train.benchmark.step_table import as_csv, markdown, terminal_table
from fat_train.benchmark.step_verdict import Setup, Verdict, rate, sentence, verdict_of
from fat_train.callback.preemption import LeaveRequest
from fat_train.checkpoint.io import write_atomically
from fat_train.checkpoint.run_folder import RunFolder
from fat_train.command.assemble import build_training, device_of, open_run, path_of_out, plan_of, split_settings
from fat_train.command.benchmark_loader import IMAGENET_EPOCHS, IMAGENET_IMAGES
from fat_train.command.say import is_rank_zero, say
from fat_train.config.run import RunConfig, plain
from fat_train.data.datamodule import DataSource, SyntheticDataConfig, choose_backend, cores_of_rank
from fat_train.metric.record import format_duration
from fat_train.report.machine import machine_facts
from fat_train.trainer.build import build_trainer
from fat_train.trainer.loaders import AtRunPosition, RunLoaders
from fat_train.trainer.module import TrainingModule
from fat_train.trainer.plan import RunPlan
from fat_train.types import UserError

LOADER_S = 3.0
"""Seconds that the loader is timed alone."""
NO_WAIT_SHARE = 0.01
"""Of an update: a wait shorter than this is the handing over of a batch that was ready."""


@dataclass(frozen=True, kw_only=True)
class StepBenchmarkSettings:
    """What `conf/benchmark_step.yaml` adds to a run's configuration."""

    warmup: int = 20
    """Updates before those that count: threads start, caches fill, kernels are chosen or compiled."""
    updates: int = 100
    """Updates that count; the first and the last one of an epoch do not."""
    trace: bool = False
    """Write a Chrome trace (chrome://tracing, Perfetto) of three more updates."""
    out: str = "runs/benchmark_step.json"
    """Where the numbers are kept, with .csv, .md, .png and, of a trace, .trace.json.gz beside it."""

    def __post_init__(self) -> None:
        for name in ("warmup", "updates"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1; got {getattr(self, name)}")


def run(tree: DictConfig) -> Verdict | None:
    """Train for a while and tell; the run's own folder is deleted, the numbers are kept. Rank 0 gives its verdict.

    Raises:
        UserError: a wrong setting, or an epoch too short to time.
    """
    settings, values = split_settings(plain(tree), StepBenchmarkSettings)
    out = path_of_out(settings.out, ".json")
    config, source = open_run(values)
    if config.debug.profile:
        raise UserError("debug.profile=true takes the place that the clock of benchmark step needs: give trace=true")
    plan = plan_of(config, source)
    window = Window.of(
        warmup=settings.warmup,
        updates=settings.updates,
        steps_per_epoch=plan.steps_per_epoch,
        log_every_n_steps=config.trainer.log_every_n_steps,
        trace=settings.trace,
    )
    trace = out.with_suffix(".trace.json.gz") if settings.trace and is_rank_zero() else None
    say(f"timing         {config.name}: {settings.warmup} updates to warm up, then {settings.updates} ...")
    for line in plan.lines()[:1]:
        say(line)
    clock = StepClock(
        window,
        accumulate=plan.accumulate,
        log_every_n_steps=config.trainer.log_every_n_steps,
        cuda=config.trainer.kind == "gpu",
        trace=trace,
    )
    parent = Path(config.run.folder).expanduser()
    parent.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(Path(tempfile.mkdtemp(prefix=".benchmark_step.", dir=parent)))
    try:
        module, loaders = _train(config, source, plan, folder, clock)
        alone = _loader_alone(config, plan, loaders)
    finally:
        clock.close()
        shutil.rmtree(folder.root)
    if not is_rank_zero():
        return None
    split = Split(clock.rows, plan.global_batch)
    verdict = verdict_of(split, _setup(config, source, plan, module, clock))
    facts = machine_facts(parent, None if isinstance(config.data, SyntheticDataConfig) else source.root)
    lines = [
        f"verdict        {sentence(verdict, split, _hours(split, plan))}",
        *_lines(config, plan, clock, split, alone),
    ]
    title = f"{config.name}, {plan.global_batch} images an update"
    kept = {
        "machine": facts,
        "settings": {name: value for name, value in plain(tree).items() if name != "out"},
        "plan": plan.__dict__,
        "lines": lines,
        "verdict": verdict._asdict(),
        "parts": _parts(split),
        "images_per_s": split.images_per_s,
        "images_per_s_with_a_free_loader": split.images_per_s_unless_waiting,
        "images_per_s_of_the_loader_alone": alone,
        "peak_memory_bytes": clock.peak_bytes,
        "waits_in_step": dict(clock.waits.in_step),
        "waits_in_loader": dict(clock.waits.in_loader),
        "updates": [asdict(row) for row in clock.rows],
        "turns": [asdict(row) for row in clock.turns],
    }
    write_atomically(out, json.dumps(kept, indent=1))
    write_atomically(out.with_suffix(".csv"), as_csv(clock.rows))
    write_atomically(out.with_suffix(".md"), markdown(split, [_machine(facts), *lines]))
    draw_split(split, title, out.with_suffix(".png"))
    Console().print(terminal_table(split, title))
    for line in [_machine(facts), *lines]:
        say(line)
    say(f"details        {out}, .csv, .md (with what each number counts), .png{', .trace.json.gz' if trace else ''}")
    return verdict


def _train(
    config: RunConfig, source: DataSource, plan: RunPlan, folder: RunFolder, clock: StepClock
) -> tuple[TrainingModule, RunLoaders]:
    """The part of a run that is timed, with all of its callbacks; one epoch if that is long enough."""
    pl.seed_everything(config.run.seed, verbose=False)
    module, loaders = build_training(config, source, plan, provenance={})
    clock.attach(module.task)
    window = clock.window
    steps = min(plan.steps_per_epoch, window.total)
    # Nothing is validated, so there is no best one to keep.
    saving = replace(config.callback.checkpoint, top_k=0, every_n_epochs=0, every_n_minutes=0, every_n_steps=0)
    with LeaveRequest(config.callback.preemption, speaks=is_rank_zero()) as request:
        callbacks = replace(config.callback, checkpoint=saving).build(
            folder=folder,
            request=request,
            images_per_update=plan.global_batch,
            steps_per_epoch=steps,
            epochs=window.epochs,
            log_every_n_steps=config.trainer.log_every_n_steps,
            val_every_n_epochs=1,
        )
        trainer = build_trainer(
            config.trainer,
            folder=folder.root,
            epochs=window.epochs,
            accumulate=plan.accumulate,
            clip_grad_norm=config.optim.clip_grad_norm,
            callbacks=[*callbacks, StopAfter(window.total)],
            loggers=[],
            max_batches=steps * plan.accumulate,
            max_val_batches=0,
        )
        trainer.profiler = clock  # type: ignore[attr-defined]  # Lightning sets it by another name
        trainer.fit(module, datamodule=loaders)
    return module, loaders


def _loader_alone(config: RunConfig, plan: RunPlan, loaders: RunLoaders) -> float | None:
    """Images a second of all ranks' loaders together, going on with nothing to wait for."""
    trainer = loaders.trainer
    assert trainer is not None
    training = trainer.train_dataloader
    assert isinstance(training, AtRunPosition)
    training.loader.set_epoch(trainer.current_epoch + 1)
    own = loader_rate(training.loader, discard=2 * _workers(config) + 4, seconds=LOADER_S)
    return None if own is None else own * plan.world_size


def _workers(config: RunConfig) -> int:
    given = config.data.num_workers
    return cores_of_rank(config.trainer.devices) if given is None else given


def _setup(config: RunConfig, source: DataSource, plan: RunPlan, module: TrainingModule, clock: StepClock) -> Setup:
    backend = choose_backend(config.data.backend, device_of(config), config.data.decode)
    total = torch.cuda.get_device_properties(0).total_memory if config.trainer.kind == "gpu" else None
    return Setup(
        device=config.trainer.kind,
        precision=config.trainer.precision,
        compiled=is_compiled(module.model),
        channels_last=config.trainer.channels_last,
        grad_checkpointing=config.trainer.grad_checkpointing,
        batch_per_device=plan.batch_per_device,
        accumulate=plan.accumulate,
        memory_share=None if total is None else clock.peak_bytes / total,
        backend="synthetic" if isinstance(config.data, SyntheticDataConfig) else backend.name,
        decode=backend.decode,
        workers=_workers(config),
        cores=cores_of_rank(config.trainer.devices),
        packed=source.train.members is not None,
    )


def _hours(split: Split, plan: RunPlan) -> str:
    """What runs take at this rate; an image less than a whole update is the next epoch's."""

    def hours(images: float) -> str:
        seconds = images / split.images_per_s
        return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else format_duration(seconds)

    own = plan.epochs * plan.steps_per_epoch * plan.global_batch
    return (
        f"at {rate(split.images_per_s)} img/s {IMAGENET_EPOCHS} epochs of ImageNet-1K take "
        f"{hours(IMAGENET_EPOCHS * IMAGENET_IMAGES)}, this run ({plan.epochs} epochs of "
        f"{plan.steps_per_epoch * plan.global_batch:,} images) {hours(own)}, validation not counted"
    )


def _lines(config: RunConfig, plan: RunPlan, clock: StepClock, split: Split, alone: float | None) -> list[str]:
    waited = split.share("data")
    loader = f"waited for {waited:.1%} of an update" if waited >= NO_WAIT_SHARE else f"not waited for ({waited:.1%})"
    if alone is None:
        loader += "; an epoch is too short to time it alone"
    else:
        loader += f"; alone it makes {rate(alone)} img/s, {alone / split.images_per_s:.1f} x what this run takes"
    where = "the GPU's, of tensors" if config.trainer.kind == "gpu" else "the process's, all included"
    free = rate(split.images_per_s_unless_waiting)
    lines = [
        f"speed          {rate(split.images_per_s)} img/s; {free} with a loader that is never waited for",
        f"loader         {loader}",
        f"peak memory    {clock.peak_bytes / 2**20:,.0f} MiB ({where}{', rank 0' if plan.world_size > 1 else ''})",
    ]
    turn_s = split.turn_s(clock.turns)
    if turn_s is not None:
        lines.append(f"epoch          {turn_s:.2f} s more where one ends and the next begins; not counted")
    return [*lines, *_told_of_waits(config, clock, len(split.rows) + len(clock.turns))]


def _told_of_waits(config: RunConfig, clock: StepClock, updates: int) -> list[str]:
    """How often the host asked the device for a value, and where."""
    places = clock.waits.lines()
    count = sum(clock.waits.in_step.values())
    if config.trainer.kind == "gpu":
        told = f"the host {_times('waited', count)} for the GPU in {updates} updates, those that log left out"
    else:
        told = f"the host {_times('asked', count)} for a value in an update (on a CPU nobody waits for that)"
    return [f"waits          {told}" + (": at " + ", ".join(places) if places else "")]


def _times(verb: str, count: int) -> str:
    return {0: f"never {verb}", 1: f"{verb} once"}.get(count, f"{verb} {count} times")


def _parts(split: Split) -> dict[str, dict[str, Any]]:
    sides = {"host": False} | ({"device": True} if split.on_device else {})
    return {
        part: {
            side: {"median_ms": split.median_ms(part, device=device), "share": split.share(part, device=device)}
            for side, device in sides.items()
        }
        for part in PARTS
        if split.occurs(part)
    }


def _machine(facts: dict[str, str]) -> str:
    gpus = [fact for name, fact in facts.items() if name.startswith("GPU") and fact != "none"]
    parts = [f"{len(gpus)} x {gpus[0]}"] if gpus else []
    parts += [f"{facts['CPU cores']} cores", facts["memory"], f"torch {facts['torch']}"]
    return f"machine        {', '.join(parts)}"
