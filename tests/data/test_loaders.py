"""What holds for the loaders of every back end."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.datamodule import FolderDataConfig, build_loader, open_data
from fat_train.data.loader import Loader
from fat_train.types import Batch, UserError

needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
BACKENDS = [pytest.param("dali", marks=needs_dali), "torch"]
PX = 32
LoaderOf = Callable[..., Loader]


@pytest.fixture(params=BACKENDS)
def loader_of(request: pytest.FixtureRequest, picture_root: Path) -> LoaderOf:
    """Build loaders over the made pictures (21 for training, 15 for validation) with one back end."""

    def build(
        split: str = "train",
        root: Path = picture_root,
        num_workers: int = int(request.param == "dali"),
        batch_per_device: int = 3,
        repeats: int = 1,
        **kwargs: int,
    ) -> Loader:
        config = FolderDataConfig(
            root=str(root), backend=request.param, num_workers=num_workers, image_px=PX, eval_resize_px=40
        )
        source = open_data(config)
        index = source.train if split == "train" else source.val
        augment = AugmentConfig(repeats=repeats) if split == "train" or repeats > 1 else None
        return build_loader(config, index, split, augment, batch_per_device=batch_per_device, **kwargs)

    return build


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*fields) for fields in zip(one, other, strict=True))


def take(loader: Loader, count: int) -> list[Batch]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_a_batch_holds_pictures_targets_rows_and_rectangles(loader_of: LoaderOf) -> None:
    loader = loader_of(accumulate=2)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((3, PX, PX, 3), torch.uint8)
        assert (batch.erase.shape, batch.erase.dtype) == ((3, 1, 4), torch.int64)
        np.testing.assert_array_equal(batch.targets, loader.index.targets[batch.indices])


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_validation_hands_out_each_image_once_whatever_the_world(loader_of: LoaderOf, world_size: int) -> None:
    loaders = [loader_of("val", rank=rank, world_size=world_size) for rank in range(world_size)]
    pictures = {
        int(row): picture
        for loader in loaders
        for batch in loader
        for row, picture in zip(batch.indices, batch.images, strict=True)
    }
    assert sorted(pictures) == list(range(15))
    assert sum(len(batch.targets) for loader in loaders for batch in loader) == 15
    alone = torch.cat([batch.images for batch in loader_of("val")])
    assert all(torch.equal(alone[row], picture) for row, picture in pictures.items())


def test_two_ranks_make_the_pictures_that_one_makes_by_accumulating(loader_of: LoaderOf) -> None:
    alone = list(loader_of(accumulate=2))
    ranks = [list(loader_of(rank=rank, world_size=2)) for rank in range(2)]
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert_equal(together, alone)


@pytest.mark.parametrize("position", [0, 1, 4, 5, 7])
def test_a_restored_loader_goes_on_with_the_very_next_batch(loader_of: LoaderOf, position: int) -> None:
    unbroken = loader_of()
    unbroken.set_epoch(3)
    whole, before = list(unbroken), loader_of()
    before.set_epoch(3)
    take(before, position)
    state = before.state_dict()
    assert state == {"epoch": 3, "batch": position}

    restored = loader_of()
    restored.load_state_dict(state)
    restored.set_epoch(3)
    rest = list(restored)
    assert_equal(rest, whole[position:])
    assert restored.state_dict() == {"epoch": 3, "batch": 7}
    assert_equal(list(restored), whole)


def test_copies_of_an_image_are_cropped_each_on_its_own(loader_of: LoaderOf) -> None:
    (batch,) = list(loader_of(batch_per_device=21, repeats=3))
    rows = sorted(set(batch.indices.tolist()))
    assert len(rows) == 7
    for row in rows:
        copies = batch.images[batch.indices == row]
        assert len(copies) == 3
        assert not any(torch.equal(copies[one], copies[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_repeats_pass_validation_by_and_resume_within_an_epoch(loader_of: LoaderOf) -> None:
    assert sorted(row for batch in loader_of("val", repeats=3) for row in batch.indices.tolist()) == list(range(15))
    whole, restored = list(loader_of(repeats=3)), loader_of(repeats=3)
    restored.load_state_dict({"epoch": 0, "batch": 4})
    assert_equal(list(restored), whole[4:])


def test_epochs_differ_and_an_epoch_repeats_itself(loader_of: LoaderOf) -> None:
    loader = loader_of()
    first, again = list(loader), list(loader)
    assert_equal(first, again)
    loader.set_epoch(1)
    assert loader.state_dict() == {"epoch": 1, "batch": 0}
    other = list(loader)
    assert not torch.equal(torch.cat([b.indices for b in first]), torch.cat([b.indices for b in other]))
    loader.set_epoch(0)
    assert_equal(list(loader), first)


def test_an_iteration_broken_off_does_not_leak_into_the_next(loader_of: LoaderOf) -> None:
    loader = loader_of(num_workers=1)
    whole = list(loader)
    left_hanging: Iterator[Batch] = iter(loader)
    next(left_hanging)
    assert_equal(list(loader), whole)
    with pytest.raises(RuntimeError, match="ended when a newer one began"):
        next(left_hanging)
    take(loader, 2)
    loader.set_epoch(2)
    loader.set_epoch(0)
    assert_equal(list(loader), whole)


def test_batches_stay_as_they_are_while_later_ones_are_made(loader_of: LoaderOf) -> None:
    loader = loader_of(batch_per_device=1)
    kept, copies = [], []
    for batch in loader:
        kept.append(batch.images)
        copies.append(batch.images.clone())
    assert len(kept) == 21
    assert all(torch.equal(one, other) for one, other in zip(kept, copies, strict=True))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "garbage": (lambda path: path.write_bytes(b"no picture " * 50), "it is no image"),
    "empty": (lambda path: path.write_bytes(b""), "it is no image"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:700]), "truncated"),
    "vanished": (lambda path: path.unlink(), "the file is not there any more"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_read_is_named_in_one_message(
    loader_of: LoaderOf, tmp_path: Path, picture_root: Path, damage: str
) -> None:
    root = tmp_path / "pictures"
    shutil.copytree(picture_root, root)
    victim = root / "val" / "bee" / "026.JPEG"
    loader = loader_of("val", root=root, num_workers=2)
    whole, intact = list(loader), victim.read_bytes()
    spoil, reason = DAMAGE[damage]
    spoil(victim)
    with pytest.raises(UserError, match=rf"^cannot read the image {re.escape(str(victim))} \(.*{reason}.*\)[^\n]*$"):
        list(loader)
    victim.write_bytes(intact)
    assert_equal(list(loader), whole)
