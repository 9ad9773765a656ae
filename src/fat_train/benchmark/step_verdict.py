"""What bounds a run, from the split of its step and its settings, and which settings to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fat_train.benchmark.step import Split

WAITING_SHARE = 0.1
"""Of an update: who waits that long for images is bound by them, whatever else takes longer."""
LEAD_SHARE = 0.05
"""Of an update: a GPU that is through with the backward pass so soon after the host has nothing in its queue."""
SMALL_BATCH = 64
"""Images at once that do not fill a GPU with these models."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What of a run's settings and machine decides what can be changed."""

    device: str
    """cpu, gpu or mps."""
    precision: str
    compiled: bool
    channels_last: bool
    grad_checkpointing: bool
    batch_per_device: int
    accumulate: int
    memory_share: float | None
    """Of the GPU's memory, at the peak; None without one."""
    backend: str
    """dali, torch, or synthetic."""
    decode: str
    workers: int
    """Threads or processes that read images, a rank."""
    cores: int
    """Those that a rank could use."""
    packed: bool


class Verdict(NamedTuple):
    """What an update's time is mostly spent on."""

    what: str
    ms: float
    """Of an update."""
    share: float
    change: tuple[str, ...]
    """What to try, the most promising first; empty where nothing is left."""
    waits: bool = False
    """Whether it is the input pipeline."""


def verdict_of(split: Split, setup: Setup) -> Verdict:
    """The part that has to get faster for the run to get faster."""
    waiting = split.share("data")
    if waiting >= WAITING_SHARE:
        return _verdict("the input pipeline", split, waiting, _faster_loader(setup), waits=True)
    device = {"gpu": "GPU", "mps": "GPU"}.get(setup.device, "CPU")
    computing = split.share("forward", "loss", "backward")
    if split.on_device and split.lead_share < LEAD_SHARE:
        return _verdict("the host's launches (the GPU's queue runs empty)", split, 1 - waiting, _fewer_launches(setup))
    groups = [
        _verdict(f"the {device}'s forward and backward pass", split, computing, _faster_pass(setup)),
        _verdict("the optimiser", split, split.share("clip", "optimizer", "ema"), _rarer_updates(setup)),
        _verdict("augmentation on the device", split, split.share("augment"), ["augment.mix_mode=batch"]),
        _verdict("the copy to the device", split, split.share("copy"), ["data.backend=dali"]),
        _verdict("what the callbacks do", split, split.share("callbacks"), ["a larger trainer.log_every_n_steps"]),
        _verdict("the loop around the step", split, split.share("rest"), _fewer_launches(setup)),
    ]
    return max(groups, key=lambda one: one.share)


def _verdict(what: str, split: Split, share: float, change: list[str] | Iterator[str], waits: bool = False) -> Verdict:
    return Verdict(what, 1000 * share * split.update_s, share, tuple(change), waits)


def _faster_loader(setup: Setup) -> Iterator[str]:
    if setup.backend == "synthetic":
        yield "data=imagenet (the training's own thread makes synthetic images)"
        return
    if setup.workers < setup.cores:
        yield f"data.num_workers={setup.cores} (it is {setup.workers})"
    if setup.backend == "torch":
        yield "data.backend=dali"
    elif setup.device == "gpu" and setup.decode == "cpu":
        yield "data.decode=gpu"
    if not setup.packed:
        yield "a set made smaller by the command pack"
    if setup.workers >= setup.cores:
        yield "more CPU cores a device"


def _faster_pass(setup: Setup) -> Iterator[str]:
    if setup.grad_checkpointing:
        yield "trainer.grad_checkpointing=false"
    if setup.device == "gpu" and setup.precision == "32":
        yield "trainer.precision=bf16-mixed"
    if setup.device == "cpu" and setup.precision == "bf16-mixed":
        yield "trainer.precision=32 (most CPUs have no fast bfloat16)"
    if not setup.compiled and setup.device == "gpu":  # on a CPU it has not paid (docs/log.md)
        yield "trainer.compile=default"
    if not setup.channels_last:
        yield "trainer.channels_last=true"
    yield from _larger_batch(setup)
    if setup.device == "cpu":
        yield "a GPU"


def _fewer_launches(setup: Setup) -> Iterator[str]:
    if not setup.compiled:
        yield "trainer.compile=default"
    yield from _larger_batch(setup)


def _larger_batch(setup: Setup) -> Iterator[str]:
    room = setup.memory_share is None or setup.memory_share < 0.4
    if setup.device == "gpu" and room and (setup.accumulate > 1 or setup.batch_per_device < SMALL_BATCH):
        which = "max_batch_per_device" if setup.accumulate > 1 else "global_batch"
        yield f"a larger trainer.{which} ({setup.batch_per_device} images at once)"


def _rarer_updates(setup: Setup) -> Iterator[str]:
    yield f"a larger trainer.global_batch ({setup.batch_per_device * setup.accumulate} images a device and update)"


def sentence(verdict: Verdict, split: Split, hours: str) -> str:
    """The verdict in one sentence.

    Args:
        verdict: of `verdict_of`.
        split: what it is of.
        hours: what runs take at this rate, as a clause.
    """
    by = f"{verdict.ms:,.1f} of {1000 * split.update_s:,.1f} ms an update ({verdict.share:.0%})"
    if verdict.waits:
        than = f", {rate(split.images_per_s_unless_waiting)} in place of {rate(split.images_per_s)} img/s without it"
        by = f"waited for {by}{than}"
    change = f"to try: {', '.join(verdict.change)}" if verdict.change else "no setting is left to try"
    return f"{verdict.what} bounds this run: {by}; {change}; {hours}"


def rate(per_s: float) -> str:
    """A rate for people: one decimal below ten, thousands separated."""
    return f"{per_s:.1f}" if per_s < 10 else f"{per_s:,.0f}"
