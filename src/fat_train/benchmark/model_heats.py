"""Who runs against whom: few at a time, as each holds a network, and in every heat the one that all are divided by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fat_train.benchmark.model import ModelJob, contestant_of, device_contestants, has_reference
from fat_train.benchmark.model_cost import DeviceRates
from fat_train.benchmark.model_result import Result
from fat_train.benchmark.peers import Peer
from fat_train.benchmark.race import race
from fat_train.model.backbone import ModelConfig

PEERS_AT_ONCE = 4
FIRST_PX, PX_STEPS = 7, (7, 9, 11, 13, 16)
"""Resolutions of the scaling, in sevenths of the given one: 224, 288, 352, 416, 512 px."""
DEPTHS = (1, 2, 3, 4)
BATCHES_AT_MOST = 6


@dataclass(frozen=True)
class Heat:
    """Contestants that take turns."""

    jobs: list[ModelJob]
    reference: ModelJob | None
    """Whose rate the others' are divided by; it is one of `jobs`."""
    asks_device: bool = False
    """Whether the device's own rates are measured among them."""
    counts_reference: bool = True
    """Whether the reference is a result too: it is in one heat only."""

    @property
    def entrants(self) -> int:
        """Processes of it."""
        return len(self.jobs) + 2 * self.asks_device


@dataclass
class Raced:
    """What came of some heats."""

    results: list[Result] = field(default_factory=list)
    device: DeviceRates = field(default_factory=DeviceRates)


def heats_of(
    template: ModelJob,
    models: Sequence[ModelConfig],
    contestants: Sequence[str],
    modes: Sequence[str],
    peers: Mapping[str, Peer],
) -> list[Heat]:
    """A heat a model and mode; then the peers by fours.

    Where every model has its plain reference in the race, that is what its forms are divided by, and the first one's
    what the peers are; otherwise it is one for all, the first model's `ours`, so that families stand side by side.

    Args:
        template: what all have in common.
        models: settings of ours.
        contestants: forms of ours; a folded one cannot train, and not every family has a reference.
        modes: of `MODES`.
        peers: name -> what is known of it.
    """
    heats: list[Heat] = []
    for mode in modes:
        job = replace(template, mode=mode, batch_size=1 if mode == "latency" else template.batch_size)
        jobs_of = [_forms_of(job, config, contestants) for config in models]
        references = [_first(jobs, ("reference",)) for jobs in jobs_of]
        base = references[0]
        if None in references:
            base = _first(jobs_of[0], ("ours", *contestants))
            references = [base for _ in models]
        for jobs, reference in zip(jobs_of, references, strict=True):
            beside = [] if reference is None or reference in jobs else [reference]
            heats.append(Heat([*beside, *jobs], reference, asks_device=jobs is jobs_of[0], counts_reference=not beside))
        others = [
            replace(job, contestant="peer", name=name, config=None, image_px=peer.image_px or job.image_px)
            for name, peer in peers.items()
        ]
        beside = [] if base is None else [base]
        for start in range(0, len(others), PEERS_AT_ONCE):
            heats.append(Heat([*beside, *others[start : start + PEERS_AT_ONCE]], base, counts_reference=False))
    return heats


def scaling_heats(template: ModelJob, config: ModelConfig, contestants: Sequence[str]) -> dict[str, list[ModelJob]]:
    """What is grown -> jobs, small to large: the batch; the image and the depth with a quarter of the batch.

    Args:
        template: what all have in common, the mode and the largest batch among it.
        config: the network's settings.
        contestants: whose cost is followed.
    """
    first = replace(template, name=config.name, config=config)
    few = replace(first, batch_size=max(2, template.batch_size // 4))
    batches = [template.batch_size // 2**step for step in range(BATCHES_AT_MOST)]
    sides = sorted({round(template.image_px * step / FIRST_PX / 16) * 16 for step in PX_STEPS})
    least = 2 if template.trains else 1  # of one image BatchNorm has no statistics where the map is a pixel
    axes = {
        "batch": [replace(first, batch_size=size) for size in sorted(set(batches)) if size >= least],
        "pixels": [replace(few, image_px=side) for side in sides],
        "blocks": [
            replace(few, config=replace(config, depths=[times * depth for depth in config.depths])) for times in DEPTHS
        ],
    }
    return {
        axis: [replace(job, contestant=name) for name in contestants for job in jobs] for axis, jobs in axes.items()
    }


def run_heats(
    heats: Sequence[Heat],
    top1_of: Mapping[str, float | None],
    *,
    rounds: int,
    seconds: float,
    on_turn: Callable[[str, str], None],
) -> Raced:
    """One race after another.

    Args:
        heats: who; the device's best rates hold for all.
        top1_of: name of a model -> its published top-1, if there is one.
        rounds: turns of each that count.
        seconds: of a turn.
        on_turn: told the contestant's name and what it is about to do.
    """
    raced = Raced()
    for heat in heats:
        contestants = [contestant_of(job) for job in heat.jobs]
        if heat.asks_device:
            contestants += device_contestants(heat.jobs[0])
        outcomes = race(contestants, rounds=rounds, seconds=seconds, discard=1, on_turn=on_turn)
        if heat.asks_device:
            gemm, copied = (max(outcome.rates, default=math.nan) for outcome in outcomes[len(heat.jobs) :])
            raced.device = raced.device.best(gemm, copied)
        pairs = list(zip(heat.jobs, outcomes, strict=False))
        reference = next((outcome for job, outcome in pairs if job is heat.reference), None)
        raced.results += [
            Result(job, outcome, reference, top1_of.get(job.name))
            for job, outcome in pairs
            if heat.counts_reference or job is not heat.reference
        ]
    return raced


def _forms_of(job: ModelJob, config: ModelConfig, contestants: Sequence[str]) -> list[ModelJob]:
    """What there is of the forms: only what evaluates can be folded, and the plain equations are those of some."""
    return [
        replace(job, contestant=name, name=config.name, config=config)
        for name in contestants
        if not (job.trains and "folded" in name) and (has_reference(config) or not name.startswith("reference"))
    ]


def _first(jobs: Sequence[ModelJob], contestants: Sequence[str]) -> ModelJob | None:
    """The job of the first form that there is."""
    return next((job for name in contestants for job in jobs if job.contestant == name), None)
