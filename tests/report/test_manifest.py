from __future__ import annotations

from pathlib import Path

import pytest

from fat_train.report.manifest import MANIFEST_FILE, Cell, Manifest, read_manifest, write_manifest
from fat_train.types import MissingPathError, UserError


def manifest(key: str, *values: str, words: str = "") -> Manifest:
    return Manifest([key], [Cell(name=f"{key}={v}", values={key: v}, words=[f"{key}={v}", words]) for v in values])


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = manifest("data.root", "'/a, b'", "1e-3", "null", words="x=${y}")
    write_manifest(tmp_path / "new", written)
    assert read_manifest(tmp_path / "new") == written


def test_the_same_manifest_is_not_written_again(tmp_path: Path) -> None:
    write_manifest(tmp_path, manifest("seed", "1"))
    before = (tmp_path / MANIFEST_FILE).stat().st_mtime_ns
    write_manifest(tmp_path, manifest("seed", "1"))
    assert (tmp_path / MANIFEST_FILE).stat().st_mtime_ns == before


def test_a_sweep_grows_by_values_and_takes_the_newest_words() -> None:
    grown = manifest("seed", "1", "3", words="new").joined_to(manifest("seed", "1", "2", words="old"), Path())
    assert [(cell.name, cell.words[1]) for cell in grown.cells] == [
        ("seed=1", "new"),
        ("seed=2", "old"),
        ("seed=3", "new"),
    ]


def test_a_sweep_over_other_keys_is_another_sweep() -> None:
    with pytest.raises(UserError, match="holds a sweep over seed; this one is over rate"):
        manifest("rate", "1").joined_to(manifest("seed", "1"), Path())


def test_a_value_in_another_spelling_does_not_train_twice() -> None:
    with pytest.raises(UserError, match=r"has runs of rate=1e-3, and 0\.001 would train them again"):
        manifest("rate", "0.001").joined_to(manifest("rate", "1e-3"), Path())


@pytest.mark.parametrize("text", ["keys: [a]\n", "keys: [a]\ncells: [{name: x}]\n", "- 1\n", "{", ""])
def test_a_damaged_manifest_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(UserError, match=f"{MANIFEST_FILE} cannot be read"):
        read_manifest(tmp_path)


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=f"holds no {MANIFEST_FILE}"):
        read_manifest(tmp_path)
    with pytest.raises(MissingPathError, match="there is no such folder"):
        read_manifest(tmp_path / "nowhere")
