"""What came of timing the operations, for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table as RichTable

from fat_train.op.choice import Key
from fat_train.op.table import Table

COLUMNS = ("operation", "sizes", "times", "way", "forward ms", "fwd+bwd ms", "x torch", "bandwidth")
SIZES = {
    "depthwise": "{}x{}x{}x{} k{} s{}",
    "pointwise": "{}x{}x{}x{} to {}",
    "norm": "{}x{}x{}x{}",
    "interaction": "{}x{}x{}x{}",
    "attention": "{0}x{1} heads, {2} to {4} tokens, D {3}",
}
FLAG = {("depthwise", "True"): " + x", ("interaction", "True"): " both gates"}
NOTES = (
    "sizes: images x channels x height x width; times: how often a forward pass of the model computes it",
    "x torch: the definition's time by this way's, forward and backward; * is the choice, which op=auto takes on a GPU",
    "bandwidth: bytes that the definition cannot but move, by the time of forward and backward, as a share of a plain "
    "copy's; a pointwise convolution is bound by arithmetic instead",
    "all ways take turns; a GPU's caches are flushed before each, and the median counts; on a CPU the least",
)


def rows_of(table: Table, counts: Mapping[Key, int], copy_rate: float) -> Iterator[tuple[str, ...]]:
    """A row a case and way.

    Args:
        table: what was measured.
        counts: of each case in a forward pass.
        copy_rate: bytes per second of a plain copy.
    """
    for key, row in table.rows.items():
        about = (key[0], _sizes(key), str(counts[key]))
        torch_ms = row.times["torch"].step if "torch" in row.times else math.nan
        for way, ms in row.times.items():
            share = row.step_bytes / (ms.step / 1000) / copy_rate
            star = "*" if way == row.way else ""
            figures = (f"{ms.forward:.3f}", f"{ms.step:.3f}", f"{torch_ms / ms.step:.2f}", f"{share:.0%}")
            yield (*about, way + star, *figures)
            about = ("", "", "")
        for way, why in row.refused.items():
            yield (*about, way, f"refused: {why}", "", "", "")
            about = ("", "", "")


def verdict(table: Table, counts: Mapping[Key, int]) -> list[str]:
    """How much the chosen ways save of a model's forward and backward pass, together and operation by operation."""
    lines = []
    operations = sorted({key[0] for key in table.rows})
    for name, chosen in (("all of them", operations), *((one, [one]) for one in operations)):
        rows = [row for key, row in table.rows.items() if key[0] in chosen and "torch" in row.times]
        plain = sum(counts[row.key] * row.times["torch"].step for row in rows)
        ours = sum(counts[row.key] * row.times[row.way].step for row in rows)
        if ours:
            lines.append(f"{name}: {ours:.2f} ms of forward and backward, {plain:.2f} by torch: {plain / ours:.2f} x")
    return lines


def refused(table: Table) -> list[str]:
    """A sentence a way that may not be taken."""
    return [
        f"{way} is refused for {row.key[0]} {_sizes(row.key)}: {why}"
        for row in table.rows.values()
        for way, why in row.refused.items()
    ]


def terminal_table(table: Table, counts: Mapping[Key, int], copy_rate: float, title: str) -> RichTable:
    """For a terminal, a block an operation."""
    shown = RichTable(*COLUMNS[:2], title=title, title_justify="left")
    for name in COLUMNS[2:]:
        shown.add_column(name, justify="left" if name == "way" else "right")
    previous = ""
    for row in rows_of(table, counts, copy_rate):
        if row[0] and previous not in ("", row[0]):
            shown.add_section()
        previous = row[0] or previous
        shown.add_row(*row)
    return shown


def markdown(tables: Mapping[str, tuple[Table, Mapping[Key, int], Sequence[str]]], copy_rate: float) -> str:
    """The same as a text to keep: title -> table, counts and the sentences over it."""
    text = []
    for title, (table, counts, lines) in tables.items():
        text += [f"**{title}**", "", "| " + " | ".join(COLUMNS) + " |", "|---|---|---:|---|---:|---:|---:|---:|"]
        text += [
            "| " + " | ".join(cell.replace("|", "/") for cell in row) + " |"
            for row in rows_of(table, counts, copy_rate)
        ]
        text += ["", *(f"- {line}" for line in lines), ""]
    return "\n".join([*text, *(f"- {line}" for line in NOTES)]) + "\n"


def _sizes(key: Key) -> str:
    operation, _, *sizes = key
    return SIZES[operation].format(*sizes) + FLAG.get((operation, sizes[-1]), "")
