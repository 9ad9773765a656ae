"""What came of a race between loaders, for a terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence

from rich.table import Table

from fat_train.benchmark.loader import NOTES, baseline_of
from fat_train.benchmark.race import Outcome

COLUMNS = ("recipe", "contestant", "images/s", "min – max", "x timm")
NOTHING = "–"
Results = Mapping[str, Sequence[Outcome]]
"""Recipe -> outcomes."""


def ratio_of(outcome: Outcome, among: Sequence[Outcome]) -> float:
    """Median of the per-round ratios to the baseline; not a number without it."""
    baseline = next((other for other in among if other.name == baseline_of(outcome.name)), None)
    return math.nan if baseline is None else outcome.ratio_to(baseline)


def rows_of(results: Results) -> list[tuple[str, ...]]:
    """A row a recipe and contestant; who did not take part has the reason in place of numbers."""
    rows: list[tuple[str, ...]] = []
    for recipe, outcomes in results.items():
        for outcome in outcomes:
            if outcome.why_not:
                rows.append((recipe, outcome.name, NOTHING, outcome.why_not, NOTHING))
                continue
            ratio = ratio_of(outcome, outcomes)
            spread = f"{min(outcome.rates):,.0f} – {max(outcome.rates):,.0f}"
            shown = NOTHING if math.isnan(ratio) else f"{ratio:.2f}"
            rows.append((recipe, outcome.name, f"{outcome.rate:,.0f}", spread, shown))
    return rows


def cost_lines(results: Results, workers: int) -> list[str]:
    """What RandAugment and erasing cost each contestant on top of the crop: a core's time an image."""
    if not {"crop", "full"} <= set(results):
        return []
    lines = []
    full_of = {outcome.name: outcome for outcome in results["full"]}
    for crop in results["crop"]:
        full = full_of[crop.name]
        if math.isnan(crop.rate) or math.isnan(full.rate):
            continue
        if full.rate >= crop.rate:
            lines.append(f"{crop.name}: not to be told, the machine's load changed more between the turns")
            continue
        ms = 1000 * workers * (1 / full.rate - 1 / crop.rate)
        share = crop.rate / full.rate - 1
        lines.append(f"{crop.name}: {ms:.2f} ms of a core an image, {share:.0%} on top of the crop")
    return lines


def verdict(results: Results, workers: int) -> tuple[str, float] | None:
    """One sentence about our faster loader with the richest recipe that was timed, and its images per second."""
    for recipe in ("full", "crop", "eval"):
        outcomes = results.get(recipe, ())
        ours = [outcome for outcome in outcomes if outcome.name in ("dali", "torch") and not math.isnan(outcome.rate)]
        if ours:
            best = max(ours, key=lambda outcome: outcome.rate)
            ratio = ratio_of(best, outcomes)
            than = "" if math.isnan(ratio) else f": {ratio:.2f} x timm"
            return f"{workers} cores feed {best.rate:,.0f} img/s of the {recipe} recipe ({best.name}){than}", best.rate
    return None


def terminal_table(results: Results) -> Table:
    """For a terminal, a block a recipe."""
    table = Table(*COLUMNS[:2], title="Loaders, images per second", title_justify="left")
    for name in COLUMNS[2:]:
        table.add_column(name, justify="right")
    previous = None
    for row in rows_of(results):
        if previous not in (None, row[0]):
            table.add_section()
        table.add_row(*row)
        previous = row[0]
    return table


def markdown(results: Results, lines: Sequence[str]) -> str:
    """The same as a text to keep, with `lines` (machine, verdict, costs) over the notes."""
    heads = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---:|---:|---:|"]
    rows = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows_of(results)]
    return "\n".join([*heads, *rows, "", *(f"- {line}" for line in (*lines, *NOTES))]) + "\n"


def as_csv(results: Results) -> str:
    """A line a turn."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("recipe", "contestant", "round", "images_per_s"))
    for recipe, outcomes in results.items():
        for outcome in outcomes:
            writer.writerows((recipe, outcome.name, n, f"{rate:.2f}") for n, rate in enumerate(outcome.rates, 1))
    return text.getvalue()
