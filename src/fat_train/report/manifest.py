"""What a sweep consists of: `sweep.yaml` in its folder, which its command writes and its report reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from fat_train.checkpoint.io import write_atomically
from fat_train.types import MissingPathError, UserError

MANIFEST_FILE = "sweep.yaml"
HEAD = "# The runs of a sweep, a folder each: `python -m fat_train report sweep=<this folder>` compares them.\n"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    name: str
    """Of the run, and of its folder in the sweep's."""
    values: dict[str, str]
    """Key -> value as it was written, of the keys that the sweep gives several values to."""
    words: list[str]
    """Words of the run, but for its `name` and `folder`."""


@dataclass(frozen=True)
class Manifest:
    """The cells of a sweep, each with a value for the same keys."""

    keys: list[str]
    """What is swept, sorted."""
    cells: list[Cell]

    def joined_to(self, former: Manifest, folder: Path) -> Manifest:
        """The cells of both; a former cell of the same name gets this one's words. `folder` is the sweep's.

        Raises:
            UserError: the former sweep is over other keys, or a value of it is now written otherwise.
        """
        if former.keys != self.keys:
            raise UserError(
                f"{folder} holds a sweep over {', '.join(former.keys)}; this one is over {', '.join(self.keys)}. "
                "Give another name=<name>"
            )
        known = {key: {meaning(cell.values[key]): cell.values[key] for cell in former.cells} for key in self.keys}
        for key, value in (item for cell in self.cells for item in cell.values.items()):
            spelt = known[key].get(meaning(value), value)
            if spelt != value:
                raise UserError(
                    f"{folder} has runs of {key}={spelt}, and {value} would train them again. Write {key}={spelt}"
                )
        cells = {cell.name: cell for cell in (*former.cells, *self.cells)}
        return Manifest(self.keys, list(cells.values()))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into the sweep's folder, unless the same stands there.

    Raises:
        UserError: the system refuses.
    """
    path = folder / MANIFEST_FILE
    text = HEAD + yaml.safe_dump(asdict(manifest), sort_keys=False, allow_unicode=True, width=10_000)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the sweep in a folder.

    Raises:
        MissingPathError: the folder, or the file in it, is not there.
        UserError: the file is not what `write_manifest` writes.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        what = f"it holds no {MANIFEST_FILE}" if folder.is_dir() else "there is no such folder"
        raise MissingPathError(f"sweep={folder} must be the folder of a sweep, as -m makes it; {what}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Manifest(content["keys"], [Cell(**cell) for cell in content["cells"]])
    except (yaml.YAMLError, OSError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: delete it, and the sweep's command writes it anew") from error


def meaning(written: str) -> str:
    """One text for all spellings of a number: `1e-3` and `0.001`."""
    number = as_number(written)
    return written if number is None else repr(number)


def as_number(written: str) -> float | None:
    """The number that a value is, or None."""
    try:
        return float(written)
    except ValueError:
        return None
