"""From words with several values to the runs of a sweep: one for each combination, named by its values."""

from __future__ import annotations

import decimal
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from fat_train.config.compose import compose, conf_folders, group_choices, parse_words
from fat_train.config.resolve import resolve
from fat_train.config.run import RunSettings, plain
from fat_train.report.manifest import Cell, meaning
from fat_train.types import UserError

NAME_AT_MOST = 80
"""Characters of a cell's name: file systems allow 255 bytes, loggers and people fewer."""
HASH_DIGITS = 8
CELL_GIVES = ("name", "folder")
"""Words that a cell has of its own, from the sweep's."""
ONE_FOR_ALL = (*CELL_GIVES, "resume", "overwrite", "debug")
"""Keys that say where a sweep lies and how it is started again: not what differs between its runs."""


def sweep_cells(words: Sequence[str], extra_dir: Path | None = None) -> list[Cell]:
    """The runs that words with several values make: their product, the last word's values varying fastest.

    `key=a,b`, `key=choice(a,b)`, `key=range(0,3)` and `group=glob(fat_*)` have several; `key=[a,b]` is one list.
    A cell's name follows from its own values and from the keys that are swept, whatever the order of the words and
    whichever other values there are.

    Args:
        words: `group=choice`, `key=value`, as on the command line after `-m`.
        extra_dir: a folder of the user's own yamls, laid out as `conf/` is.

    Raises:
        UserError: no word has several values, or one has them in a way that makes no list of runs.
    """
    choices = group_choices(conf_folders(extra_dir))
    options: list[list[str]] = []
    swept: dict[str, int] = {}
    parsed = parse_words(words, sweep=True)
    words_of_key = Counter(override.key_or_group for override in parsed)
    for word, override in zip(words, parsed, strict=True):
        key = override.key_or_group
        if override.is_sweep_override():
            if words_of_key[key] > 1:
                raise UserError(f"{word}: another word sets {key} too; give all its values in one")
            if key.partition(".")[0] in ONE_FOR_ALL:
                raise UserError(f"{word}: {key} is one for the whole sweep; a comma in a value wants quotes: '\"a,b\"'")
            swept[key] = len(options)
            options.append([f"{override.get_key_element()}={value}" for value in _values(override, choices)])
        elif key not in CELL_GIVES:
            options.append([word])
    if not swept:
        raise UserError("-m runs one training per value, and no word has several. Write them as seed=0,1,2")
    cells = []
    for chosen in itertools.product(*options):
        values = {key: chosen[at].partition("=")[2] for key, at in sorted(swept.items())}
        cells.append(Cell(name=_name(values), values=values, words=list(chosen)))
    return cells


def sweep_place(words: Sequence[str], extra_dir: Path | None = None) -> tuple[str, Path]:
    """The sweep's name, and the folder that its runs' folders are in but for debugging ones.

    The name follows from the words that have one value: `name=`, or else what a run of them would be called, without a
    model or a data set that differs from run to run, and "_sweep".

    Raises:
        UserError: as `compose` does, or the name is no folder's.
    """
    parsed = list(zip(words, parse_words(words, sweep=True), strict=True))
    swept = {override.key_or_group for _, override in parsed if override.is_sweep_override()}
    base = plain(compose("train", [word for word, one in parsed if not one.is_sweep_override()], extra_dir))
    if any(override.key_or_group == "name" for _, override in parsed) and base["name"]:
        name = base["name"]
    elif "experiment" in swept:
        name = "experiment_sweep"
    else:
        parts = [base[group].get("name", group) for group in ("model", "data") if group not in swept]
        name = "_".join([base["name"]] if base["name"] else parts) + "_sweep"
    settings = resolve({"name": name.lstrip("_"), "folder": base["folder"]}, RunSettings, where="")
    return settings.name, Path(settings.folder).expanduser() / settings.name


def _values(override: Override, choices: Mapping[str, list[str]]) -> list[str]:
    """The values of one word, each as it was written where that can be told."""
    key, line, value = override.key_or_group, override.input_line, override.value()
    if isinstance(value, IntervalSweep):
        raise UserError(f"{line}: an interval is no list of values; write some of it, as {key}=range(0,1,0.25)")
    if getattr(value, "shuffle", False):
        raise UserError(f"{line}: in a random order no two starts of the sweep would number its runs alike")
    if isinstance(value, Glob):
        if key not in choices:
            raise UserError(f"{line}: glob chooses among a group's files, and {key} is no group")
        found = value.filter(choices[key])
        if not found:
            raise UserError(f"{line}: no such choice\nAllowed: {', '.join(choices[key])}")
        return found
    if isinstance(value, RangeSweep):
        found = list(_range(value, str(line)))
    else:
        found = _as_written(override) or list(override.sweep_string_iterator())
    counts = Counter(map(meaning, found))
    twice = [value for value in found if counts[meaning(value)] > 1]
    if twice:
        raise UserError(f"{line}: one value stands there twice ({' and '.join(twice)})")
    return found


def _range(value: RangeSweep, line: str) -> Iterable[str]:
    """In decimals: in binary 0.05 added up three times is 0.15000000000000002."""
    start, stop, step = (decimal.Decimal(str(part)) for part in (value.start, value.stop, value.step))
    if step == 0 or (stop - start) / step <= 0:
        raise UserError(f"{line}: this range is empty; it is range(start,stop,step) without the stop itself")
    whole = all(isinstance(part, int) for part in (value.start, value.stop, value.step))
    for turn in itertools.count():
        at = start + turn * step
        if (at >= stop) if step > 0 else (at <= stop):
            return
        yield str(int(at) if whole else float(at))


def _as_written(override: Override) -> list[str] | None:
    """The values' own spelling (1e-3, not 0.001), cut at the word's outer commas; None if that is not all of them."""
    text = override.get_value_string().strip()
    inner = re.fullmatch(r"choice\((.*)\)", text, flags=re.DOTALL)
    pieces, depth, quote = [""], 0, ""
    for letter in inner[1] if inner else text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        depth += 0 if quote else (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    pieces = [piece.strip() for piece in pieces]
    parser = OverridesParser.create()
    try:
        read = [parser.parse_override(f"key={piece}").get_value_element_as_str() for piece in pieces]
    except HydraException:
        return None
    return pieces if read == list(override.sweep_string_iterator()) else None


def _name(values: Mapping[str, str]) -> str:
    """`drop_path_rate=0.05,seed=1`: a key by its last part where no other ends alike."""
    lasts = Counter(_last(key) for key in values)
    name = ",".join(f"{_last(key) if lasts[_last(key)] == 1 else key}={_safe(value)}" for key, value in values.items())
    name = name.replace("/", ".")  # of a group within a group
    return name if len(name) <= NAME_AT_MOST else f"{name[: NAME_AT_MOST - HASH_DIGITS - 1]}-{_hash(name)}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _safe(value: str) -> str:
    """What any file system and shell takes; values that differ stay apart."""
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "-", value)
    return value if safe == value else f"{safe.strip('-')}-{_hash(value)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]
