"""Our input pipeline in a loop that is not ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import fat_train
from fat_train.augment.device import to_input
from fat_train.augment.policy import AugmentConfig
from fat_train.data.digits import digits_root
from fat_train.data.inputs import InputLoader
from fat_train.data.loader import Loader
from fat_train.types import Batch, MissingPathError, UserError

needs_dali = pytest.mark.skipif(importlib.util.find_spec("nvidia") is None, reason="DALI is not installed")
BACKENDS = [pytest.param("dali", marks=needs_dali), "torch"]
WORLD_SIZES = (1, 2, 3, 5)
Create = Callable[..., InputLoader]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits_cache: Path) -> Path:
    """train/ and val/ with 23 and 17 of the digits, numbers that no batch divides."""
    root = tmp_path_factory.mktemp("few")
    for split, count in (("train", 23), ("val", 17)):
        for number, file in enumerate(sorted((digits_root() / split).glob("*/*.jpg"))[::11][:count]):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to(file)
    return root


@pytest.fixture(params=BACKENDS)
def create(request: pytest.FixtureRequest, pictures: Path) -> Create:
    """`create_loader` over them with one back end."""

    def build(**options: object) -> InputLoader:
        settings = {"image_px": 32, "batch_size": 2, "num_workers": int(request.param == "dali")} | options
        return fat_train.create_loader(pictures, backend=request.param, **settings)

    return build


def rows_of_ranks(create: Create, world_size: int, epoch: int, **options: object) -> list[list[int]]:
    ranks = []
    for rank in range(world_size):
        loader = create(rank=rank, world_size=world_size, normalize=False, **options)
        loader.set_epoch(epoch)
        ranks.append([int(row) for batch in loader for row in batch.indices])
    return ranks


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_share_no_training_image_and_together_take_whole_steps(create: Create, world_size: int) -> None:
    steps = 23 // (2 * world_size)
    for epoch in (0, 4):
        ranks = rows_of_ranks(create, world_size, epoch)
        seen = [row for rows in ranks for row in rows]
        assert len(seen) == len(set(seen)) == steps * 2 * world_size
        assert {len(rows) for rows in ranks} == {2 * steps}
        assert set(seen) <= set(range(23))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("batch_size", [4, 17])
def test_ranks_together_take_each_validation_image_once(create: Create, world_size: int, batch_size: int) -> None:
    ranks = rows_of_ranks(create, world_size, 0, split="val", batch_size=batch_size)
    assert sorted(row for rows in ranks for row in rows) == list(range(17))


def test_the_eval_recipe_takes_each_training_image_once_and_in_order(create: Create) -> None:
    loader = create(recipe="eval", batch_size=5, normalize=False)
    assert [int(row) for batch in loader for row in batch.indices] == list(range(23))
    assert len(loader) == 5


def assert_same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert all(torch.equal(*parts) for parts in zip(one, other, strict=True))


@pytest.mark.parametrize("position", [0, 1, 7])
def test_a_new_loader_goes_on_with_the_very_batches_that_were_left(create: Create, position: int) -> None:
    options = {"erase_prob": 1.0, "batch_size": 3}
    unbroken = create(**options)
    unbroken.set_epoch(2)
    whole = list(unbroken)
    before = create(**options)
    before.set_epoch(2)
    iterator = iter(before)
    for _ in range(position):
        next(iterator)
    after = create(**options)
    after.load_state_dict(before.state_dict())
    torch.manual_seed(position)  # of no consequence
    assert_same(list(after), whole[position:])


def test_erasing_noise_follows_from_seed_epoch_and_step_and_leaves_torchs_own_alone(create: Create) -> None:
    options = {"recipe": "none", "erase_prob": 1.0, "batch_size": 23}  # one step an epoch, of every image
    torch.manual_seed(3)
    ((first, _),) = create(**options)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))

    ((again, _),) = create(**options)
    ((other_seed, _),) = create(**options, seed=1)
    next_epoch = create(**options)
    next_epoch.set_epoch(1)
    ((later, _),) = next_epoch
    assert torch.equal(first, again)
    noise = [set(images.flatten().tolist()) for images in (first, other_seed, later)]
    assert all(len(one - other) > 1000 for one in noise for other in noise if one is not other)


def test_images_are_the_batchs_pixels_normalised_in_channels_last_memory(create: Create) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    batches: list[Batch] = list(create(split="val", batch_size=8, normalize=False))
    inputs = list(create(split="val", batch_size=8, mean=mean, std=std))
    for batch, (images, targets) in zip(batches, inputs, strict=True):
        assert torch.equal(images, to_input(batch.images, mean, std))
        assert torch.equal(targets, batch.targets)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_a_plain_loop_trains_with_timms_mixup_too(create: Create) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = create(recipe="none", batch_size=8)
    losses = []
    for epoch in range(20):
        loader.set_epoch(epoch)
        for images, targets in loader:
            loss = nn.functional.cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:2])

    images, targets = next(iter(loader))
    mixed, soft = timm.data.Mixup(mixup_alpha=0.8, num_classes=3)(images, targets)
    assert mixed.shape == images.shape
    assert soft.shape == (8, 3)


def test_fields_of_the_recipe_are_replaced_one_by_one(pictures: Path) -> None:
    def augment(**options: object) -> AugmentConfig | None:
        return fat_train.create_loader(
            pictures, batch_size=2, backend="torch", num_workers=0, normalize=False, **options
        ).augment

    deit = AugmentConfig(color_jitter=0.4)
    assert augment() == deit
    assert augment(auto_augment="rand-m5", crop_scale=(0.5, 1)) == replace(
        deit, auto_augment="rand-m5", crop_scale=[0.5, 1.0]
    )
    own = AugmentConfig(erase_mode="const")
    assert augment(recipe=own, hflip_prob=0) == AugmentConfig(erase_mode="const", hflip_prob=0.0)
    assert augment(recipe="light") == augment(recipe="light", auto_augment=None) != AugmentConfig()
    assert augment(split="val") is None
    assert augment(split="val", recipe="deit") == deit


def test_a_folder_of_classes_alone_does(pictures: Path) -> None:
    loader = fat_train.create_loader(pictures / "val", split=None, batch_size=4, normalize=False)
    assert isinstance(loader, Loader)
    assert len(loader.index) == 17
    assert loader.index.classes == ("class0", "class1", "class2")


def test_ranks_are_torch_distributeds_where_it_runs(pictures: Path) -> None:
    def order(**options: int) -> tuple[int, int]:
        loader = fat_train.create_loader(pictures, batch_size=2, num_workers=1, normalize=False, **options)
        return loader.order.rank, loader.order.world_size

    assert order() == (0, 1)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        assert order() == (2, 4)
        assert order(rank=0, world_size=1) == (0, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"recipe": "diet"}, r"recipe=diet is not known; did you mean deit\? \(allowed: .*, eval\)"),
        ({"split": "vall"}, r"split=vall is not known; did you mean val\?"),
        ({"backend": "dally"}, r"backend=dally is not known; did you mean dali\?"),
        ({"batch_size": 24}, r"batch_size=24 x world_size=1 is more than the 23 images .*batch_size=23 or less"),
        ({"batch_size": 8, "world_size": 3}, "give batch_size=7 or less"),
        ({"world_size": 24}, "give fewer processes"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be at least 0 and less than world_size=2; got rank=2"),
        ({"auto_agument": None}, r"unknown key auto_agument; did you mean auto_augment\?"),
        ({"num_worker": 2}, r"unknown key num_worker; did you mean num_workers\?"),
        ({"erase_prob": 2}, r"erase_prob must be in \[0, 1\]"),
        ({"cutmix_alpha": 1}, "a loader does not mix"),
        ({"recipe": "eval", "hflip_prob": 0}, "leave out hflip_prob"),
        ({"device": "cdua"}, "device=cdua is not known"),
        ({"device": "cuda:99"}, "device=cuda:99 is not there"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
    ],
)
def test_a_wrong_argument_is_refused_by_its_name(pictures: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fat_train.create_loader(pictures, **{"batch_size": 1} | arguments)


def test_a_missing_folder_or_split_is_named(pictures: Path) -> None:
    with pytest.raises(MissingPathError, match=r"root=.*nowhere is not there"):
        fat_train.create_loader(pictures / "nowhere", batch_size=1)
    with pytest.raises(MissingPathError, match="train/ is missing, found class0/, class1/, class2/"):
        fat_train.create_loader(pictures / "train", batch_size=1)


def test_a_batch_that_is_kept_is_never_written_again(pictures: Path) -> None:
    loader = fat_train.create_loader(pictures, split="val", batch_size=2, image_px=16, backend="torch", num_workers=0)
    kept = [images[:, :1, 3:] for images, _ in loader]  # views alone, of every batch
    copies = [view.clone() for view in kept]
    places = {images.data_ptr() for images, _ in loader}
    assert all(torch.equal(view, copy) for view, copy in zip(kept, copies, strict=True))
    assert len(places) < len(kept), "batches that nobody keeps share their memory"


def test_validation_comes_to_the_same_integers_whatever_the_world_and_the_batch(create: Create) -> None:
    weight = torch.randn(3, 3 * 32 * 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def counts(world_size: int, batch_size: int) -> dict[str, int]:
        total = {"correct": 0, "second": 0, "images": 0}
        for rank in range(world_size):
            options = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
            for images, targets in create(split="val", **options):
                order = (images.flatten(1).double() @ weight.T).argsort(dim=1, descending=True)
                total["correct"] += int((order[:, 0] == targets).sum())
                total["second"] += int((order[:, 1] == targets).sum())
                total["images"] += len(targets)
        return total

    alone = counts(1, 17)
    assert alone["images"] == 17
    assert 0 < alone["correct"] < 17
    assert all(counts(world_size, batch_size) == alone for world_size in WORLD_SIZES for batch_size in (3, 4))
