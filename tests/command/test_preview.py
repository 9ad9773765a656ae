"""The sheet shows what training gets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from fat_train.__main__ import main
from fat_train.command.preview import captions_of
from fat_train.types import Labels


def test_a_sheet_is_written_with_as_many_tiles_as_asked_for(tmp_path: Path, digits_cache: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    assert main(["preview", "experiment=digits", "count=7", f"out={out}"]) == 0
    with Image.open(out) as sheet:
        colours = sheet.convert("RGB").getcolors(maxcolors=2**24)
        assert sheet.width > 6 * 160
    assert len(colours) > 50, "a blank sheet"


def test_the_same_words_give_the_same_picture_and_another_epoch_another(tmp_path: Path, digits_cache: Path) -> None:
    words = ["preview", "experiment=digits", "augment=deit", "count=4"]
    for name, extra in (("a", []), ("b", []), ("c", ["epoch=1"])):
        assert main([*words, *extra, f"out={tmp_path / name}.png"]) == 0
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_captions_say_both_labels_and_their_weights() -> None:
    labels = Labels(torch.tensor([0, 1]), torch.tensor([1, 0]), 0.7)
    assert captions_of(labels, ("cat", "dog")) == ["0.70 cat\n0.30 dog", "0.70 dog\n0.30 cat"]
    assert captions_of(labels._replace(weight=1.0), ("cat", "dog")) == ["cat", "dog"]


def test_captions_of_pictures_with_weights_of_their_own_say_each() -> None:
    labels = Labels(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), torch.tensor([0.7, 1.0, 0.25]))
    assert captions_of(labels, ("cat", "dog", "eel")) == ["0.70 cat\n0.30 eel", "dog", "0.25 eel\n0.75 cat"]


@pytest.mark.parametrize("mode", ["pair", "elem"])
def test_pairs_and_single_pictures_mixed_on_their_own_fill_a_sheet(
    tmp_path: Path, digits_cache: Path, mode: str
) -> None:
    words = ["preview", "experiment=digits", "augment=deit", "count=4", "augment.repeats=2"]
    for name in ("batch", mode):
        assert main([*words, f"augment.mix_mode={name}", f"out={tmp_path / name}.png"]) == 0
    assert (tmp_path / f"{mode}.png").read_bytes() != (tmp_path / "batch.png").read_bytes()
