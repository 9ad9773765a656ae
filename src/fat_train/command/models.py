"""models: every model there is, its size beside the document's, on the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from omegaconf import DictConfig
from rich import box
from rich.console import Console
from rich.table import Table

from fat_train.checkpoint.io import write_atomically
from fat_train.command.assemble import path_of_out
from fat_train.command.say import say
from fat_train.config.resolve import resolve
from fat_train.config.run import plain
from fat_train.config.zoo import ModelFacts, facts_of, list_models
from fat_train.types import UserError, nearest

COLUMNS = ("model", "family", "parameters", "MACs", "parameters", "MACs", "top-1", "top-1")
WHOSE = ("", "", "", "", "document", "document", "document", "this code")
NUMBERS_FROM = 2
LEAST_WIDTH = 100
NOTHING = "–"
DIFFERS = "≠"
NOT_RUN = "not yet run"
COMMAND = "python -m fat_train models out=docs/models.md"
NOTES = (
    "parameters and MACs: at 1000 classes, 224 px. MACs are multiply-adds of convolutions, linear layers and matrix "
    "products, attention's two among them; norms, activations and element-wise products are left out. Documents name "
    "no rule, and most leave attention's products out.",
    f"{NOTHING}: the document does not say, or the model is in none. top-1: percent of ImageNet-1K's validation set.",
)


@dataclass(frozen=True, kw_only=True)
class ModelsSettings:
    """The whole of `conf/models.yaml`."""

    pattern: str = "*"
    """Which names: fat_b*, *_nano."""
    out: str | None = None
    """A .md file for the same table; null: the terminal alone."""


def run(tree: DictConfig) -> list[ModelFacts]:
    """Print the table, and write it if asked to; returns its rows.

    Raises:
        UserError: no model has such a name, or `out` cannot be written to.
    """
    settings = resolve(plain(tree), ModelsSettings, where="")
    out = None if settings.out is None else path_of_out(settings.out, ".md")
    names = list_models(settings.pattern)
    if not names:
        known = list_models()
        hint = nearest(settings.pattern, known)
        raise UserError(f"pattern={settings.pattern} is no model's name{hint}\nModels: {', '.join(known)}")
    facts = [facts_of(name) for name in names]
    console = Console()
    console.width = max(console.width, LEAST_WIDTH)  # a pipe is said to have 80 columns, which would cut numbers off
    console.print(terminal_table(facts))
    for line in differences(facts):
        say(line)
    if out is not None:
        write_atomically(out, markdown(facts))
        say(f"table          {out}")
    return facts


def rows_of(facts: Sequence[ModelFacts]) -> list[tuple[str, ...]]:
    """Cells of `COLUMNS`, a row a model."""
    return [
        (
            one.name,
            one.family,
            f"{one.parameters:,}{f' {DIFFERS}' if one.differs else ''}",
            f"{one.macs_g:.3f} G",
            _or_nothing(one.paper_params_m, " M"),
            _or_nothing(one.paper_macs_g, " G"),
            _or_nothing(one.paper_top1),
            NOT_RUN if one.top1 is None and one.paper_top1 is not None else _or_nothing(one.top1),
        )
        for one in facts
    ]


def differences(facts: Sequence[ModelFacts]) -> list[str]:
    """A sentence a model whose parameters are not the document's, with the reason that its yaml gives."""
    return [
        f"{DIFFERS} {one.name}: {one.parameters:,} parameters, the document's {one.paper_params_m} M "
        f"({100 * (one.parameters / 1e6 / float(one.paper_params_m) - 1):+.2g} %): {one.differ_because}"
        for one in facts
        if one.paper_params_m is not None and one.differs
    ]


def terminal_table(facts: Sequence[ModelFacts]) -> Table:
    """For a terminal, a block a family."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for at, (whose, column) in enumerate(zip(WHOSE, COLUMNS, strict=True)):
        table.add_column(f"{whose}\n{column}" if whose else column, justify="right" if at >= NUMBERS_FROM else "left")
    family = ""
    for row in rows_of(facts):
        if family not in ("", row[1]):
            table.add_section()
        family = row[1]
        table.add_row(*row)
    return table


def markdown(facts: Sequence[ModelFacts]) -> str:
    """The same as a file of the documentation, which says how it is renewed."""
    heads = [f"{column}, {whose}" if whose else column for whose, column in zip(WHOSE, COLUMNS, strict=True)]
    ruler = ["---:" if at >= NUMBERS_FROM else "---" for at in range(len(COLUMNS))]
    cells = [heads, ruler, *([f"`{name}`", *rest] for name, *rest in rows_of(facts))]
    lines = [f"- {line}" for line in (*differences(facts), *NOTES)]
    return "\n".join(
        ["# Models", "", f"Written by `{COMMAND}`.", "", *(f"| {' | '.join(row)} |" for row in cells), "", *lines, ""]
    )


def _or_nothing(number: Decimal | None, unit: str = "") -> str:
    return NOTHING if number is None else f"{number}{unit}"
