"""What came of networks side by side, for a terminal, as Markdown, as CSV with timm's columns, and in sentences."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from rich.table import Table

from fat_train.benchmark.model import has_reference
from fat_train.benchmark.model_cost import DeviceRates
from fat_train.benchmark.model_result import Result

HEAD = ("mode", "model", "contestant", "batch", "px")
NUMBERS = ("img/s", "min – max", "x ref", "GMAC/s", "ms/step", "MiB", "floor", "1st s")
NUMBERS_FROM = 3
NOTHING = "–"
MODE_WORDS = {"train": "training", "infer": "inference", "latency": "latency of one image"}
NOTES = (
    "img/s: the median of the rounds, in which all of a heat take turns; min – max are the slowest and fastest round.",
    "x ref: img/s over that of the contestant named above, the median of the rounds' own ratios. FAT alone has a "
    "`reference`, the paper's equations as they read: separate PyTorch operations, NCHW, explicit softmax attention, "
    "eager, at the same precision. A race with a model that has none divides by the first model's `ours`.",
    "GMAC/s: billions of multiply-adds a second, in training those of the backward pass too.",
    "training is forward, cross entropy, backward and a fused AdamW step on random images that lie on the device; "
    "drop path is as in the model's yaml (peers have none). Loading is not part of it.",
    "MiB: the most memory at a time, weights included, over the process without the network (on a GPU: what torch has "
    "given to tensors).",
    "floor: the shortest time of a step on this device in the time that it took. The shortest is the longer of its "
    "multiply-adds at the rate of a large matrix product and its bytes at the rate of a large copy, both measured in "
    "the same run. Bytes: each convolution, linear layer and matrix product reads its operands and writes its result "
    "once, all else fused into them, attention's logits kept inside; in training also what AdamW passes over. A "
    "network smaller than the caches can beat it.",
    "1st s: seconds until the first step was done, which for compiled ones is the compiling.",
    "peers: timm's models at the image size of their published top-1, eager, NCHW.",
)


def head_of(result: Result) -> tuple[str, ...]:
    """Who, and on what."""
    job = result.job
    halved = result.finished and result.batch_size < job.batch_size
    batch = f"{result.batch_size} (of {job.batch_size})" if halved else str(job.batch_size)
    return job.mode, job.name, job.contestant, batch, str(job.image_px)


def numbers_of(result: Result, device: DeviceRates) -> tuple[str, ...]:
    """Cells of `NUMBERS`; dashes for who did not take part."""
    outcome = result.outcome
    if not result.finished:
        return (NOTHING,) * len(NUMBERS)
    digits = 1 if outcome.rate < 100 else 0
    return (
        f"{outcome.rate:,.{digits}f}",
        f"{min(outcome.rates):,.{digits}f} – {max(outcome.rates):,.{digits}f}",
        NOTHING if math.isnan(result.ratio) else f"{result.ratio:.2f}",
        f"{result.gmacs_per_s:,.{0 if result.gmacs_per_s >= 100 else 1}f}",
        f"{result.step_ms:,.{0 if result.step_ms >= 100 else 2}f}",
        f"{outcome.facts['peak_memory_mib']:,.0f}",
        NOTHING if math.isnan(result.share(device)) else f"{result.share(device):.0%}",
        f"{outcome.facts['cold_start_s']:.1f}",
    )


def bases(results: Sequence[Result]) -> list[str]:
    """Whose img/s "x ref" divides by, for the head of a table."""
    return list(dict.fromkeys(one.base for one in results if one.base))


def verdicts(results: Sequence[Result]) -> list[str]:
    """A sentence a model and mode about the fastest of ours; what a multiply-add of another family costs beside one of
    FAT's; then how the peers stand to it."""
    lines = []
    for mode, name in dict.fromkeys((one.job.mode, one.job.name) for one in results if one.job.config is not None):
        here = [one for one in results if one.job.mode == mode and one.finished]
        own = [one for one in here if one.job.name == name and one.job.contestant.startswith("ours")]
        if not own:
            continue
        by_ratio = not any(
            math.isnan(one.ratio) for one in own
        )  # which has the machine's noise of a round on both sides
        best = max(own, key=lambda one: one.ratio if by_ratio else one.outcome.rate)
        if not math.isnan(best.ratio) and best.outcome is not best.reference:
            low, high = best.ratio_span
            lines.append(
                f"{name} {MODE_WORDS[mode]}: {best.ratio:.2f} x {best.base} "
                f"({best.job.contestant}; {low:.2f} to {high:.2f} in single rounds)"
            )
        lines += _beside_fat(best, here)
        peers = [one for one in here if one.job.contestant == "peer" and one.top1 is not None]
        if peers and best.top1 is not None:
            ahead = [
                one.job.name
                for one in peers
                if one.outcome.rate >= best.outcome.rate and (one.top1 or 0.0) >= best.top1
            ]
            lines.append(
                f"{name} {MODE_WORDS[mode]}: of {len(peers)} peers {', '.join(ahead) or 'none'} "
                f"{'are' if len(ahead) > 1 else 'is'} both as fast and as accurate ({best.top1:.1f} % top-1)"
            )
    return lines


def _beside_fat(one: Result, here: Sequence[Result]) -> list[str]:
    """A multiply-add's time over that of the FAT with the nearest number of them, in the same form where it ran in it;
    nothing of a FAT itself, or without one."""
    ours = [fat for fat in here if fat.job.contestant.startswith("ours")]
    fats = [fat for fat in ours if fat.job.config is not None and has_reference(fat.job.config)]
    if one in fats or not fats:
        return []

    def distance(fat: Result) -> tuple[float, bool, float]:
        apart = abs(math.log(fat.outcome.facts["gmacs"] / one.outcome.facts["gmacs"]))
        return apart, fat.job.contestant != one.job.contestant, -fat.outcome.rate

    fat = min(fats, key=distance)
    times = fat.gmacs_per_s / one.gmacs_per_s
    if one.base == fat.base and not math.isnan(one.ratio) and not math.isnan(fat.ratio):
        # ratios of rounds instead of rates: both are then freed of what slowed one heat down
        times *= (fat.ratio / one.ratio) / (fat.outcome.rate / one.outcome.rate)
    forms = dict.fromkeys((one.job.contestant, fat.job.contestant))
    return [
        f"{one.job.name} {MODE_WORDS[one.job.mode]}: {times:.2f} x {fat.job.name}'s time at equal multiply-adds "
        f"({' beside '.join(forms)})"
    ]


def exceptions(results: Sequence[Result], device: DeviceRates) -> list[str]:
    """Which batches were made smaller, who has no numbers and why, and whether the floor can be believed."""
    lines = []
    if any(one.share(device) > 1 for one in results):
        lines.append(
            "floor: over 100 % somewhere: the caches hold that network, or the machine had other work while the "
            "device's own rates were measured"
        )
    for one in results:
        who = f"{one.who}, {MODE_WORDS[one.job.mode]}"
        if not one.finished:
            lines.append(f"{who}: not timed: {one.outcome.why_not}")
        elif one.batch_size < one.job.batch_size:
            lines.append(f"{who}: no memory for a batch of {one.job.batch_size}, timed with {one.batch_size}")
    return lines


def terminal_tables(results: Sequence[Result], device: DeviceRates) -> list[Table]:
    """For a terminal, one a mode."""
    tables = []
    for mode in dict.fromkeys(result.job.mode for result in results):
        here = [result for result in results if result.job.mode == mode]
        shown = len(NUMBERS) if any(result.job.compiles for result in here) else len(NUMBERS) - 1
        over = f" (x ref: over {', '.join(bases(here))})" if bases(here) else ""
        table = Table(title=f"{MODE_WORDS[mode].capitalize()}{over}", title_justify="left")
        table.add_column("network")
        for name in NUMBERS[:shown]:
            table.add_column(name, justify="right", no_wrap=True)
        for result in here:
            table.add_row(result.who, *numbers_of(result, device)[:shown])
        tables.append(table)
    return tables


def markdown(results: Sequence[Result], device: DeviceRates, lines: Sequence[str]) -> str:
    """The same as a text to keep, with `lines` (machine, verdicts) over the notes."""
    columns = (*HEAD, *NUMBERS)
    ruler = ["---" if at < NUMBERS_FROM else "---:" for at in range(len(columns))]
    rows = [" | ".join((*head_of(result), *numbers_of(result, device))) for result in results]
    table = [f"| {row} |" for row in (" | ".join(columns), " | ".join(ruler), *rows)]
    over = [f"x ref: over {', '.join(bases(results))}"] if bases(results) else []
    return "\n".join([*table, "", *(f"- {line}" for line in (*over, *lines, *NOTES))]) + "\n"


def as_csv(results: Sequence[Result]) -> str:
    """A line a model and contestant, in the columns of timm's benchmark.py, with the modes beside each other."""
    modes = list(dict.fromkeys(result.job.mode for result in results))
    lines: dict[tuple[str, str], dict[str, object]] = {}
    for result in results:
        if not result.finished:
            continue
        facts, prefix = result.outcome.facts, result.job.mode
        line = lines.setdefault((result.job.name, result.job.contestant), {})
        line |= {
            "model": result.job.name,
            "contestant": result.job.contestant,
            f"{prefix}_samples_per_sec": round(result.outcome.rate, 2),
            f"{prefix}_step_time": round(result.step_ms, 3),
            f"{prefix}_batch_size": result.batch_size,
            f"{prefix}_img_size": result.job.image_px,
            "infer_gmacs": round(facts["gmacs"], 3),
            "param_count": round(facts["parameters"] / 1e6, 2),
        }
    parts = ("samples_per_sec", "step_time", "batch_size", "img_size")
    columns = ["model", "contestant", *(f"{mode}_{part}" for mode in modes for part in parts)]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "infer_gmacs", "param_count"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines.values())
    return text.getvalue()
