from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from fat_train.augment.policy import AugmentConfig
from fat_train.config.resolve import resolve
from fat_train.data import datamodule
from fat_train.data.datamodule import (
    DigitsDataConfig,
    FolderDataConfig,
    SyntheticDataConfig,
    build_loader,
    choose_backend,
    cores_of_rank,
    open_data,
    picture_spec,
)
from fat_train.data.index import SPLITS
from fat_train.data.torch_folder import TorchLoader
from fat_train.types import MissingPathError, UserError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def dali_there(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datamodule, "_dali_is_installed", lambda: request.param)


@pytest.mark.usefixtures("dali_there")
@pytest.mark.parametrize(
    ("dali_there", "requested", "device", "decode", "expected", "reason"),
    [
        (True, "auto", CPU, "auto", ("dali", "cpu"), "the training device is no GPU"),
        (True, "auto", CUDA, "auto", ("dali", "gpu"), "on cuda:1"),
        (True, "dali", CUDA, "cpu", ("dali", "cpu"), "data.decode asks for it"),
        (True, "torch", CUDA, "auto", ("torch", "cpu"), "data.backend asks for it"),
        (False, "auto", CUDA, "auto", ("torch", "cpu"), "wheels for Linux alone"),
    ],
    indirect=["dali_there"],
)
def test_the_back_end_follows_what_is_there_and_says_why(
    requested: str, device: torch.device, decode: str, expected: tuple[str, str], reason: str
) -> None:
    chosen = choose_backend(requested, device, decode)
    assert (chosen.name, chosen.decode) == expected
    assert reason in chosen.reason
    assert "\n" not in chosen.reason


@pytest.mark.usefixtures("dali_there")
@pytest.mark.parametrize(
    ("dali_there", "requested", "device", "decode", "message"),
    [
        (False, "dali", CPU, "auto", r"data\.backend=dali needs NVIDIA DALI"),
        (True, "auto", CPU, "gpu", r"data\.decode=gpu needs .* a CUDA device; got dali and cpu"),
        (True, "torch", CUDA, "gpu", r"data\.decode=gpu needs data\.backend=dali .* got torch and cuda"),
    ],
    indirect=["dali_there"],
)
def test_what_is_asked_for_and_cannot_be_had_is_refused(
    requested: str, device: torch.device, decode: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_backend(requested, device, decode)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_px", 0),
        ("eval_resize_px", 100),
        ("mean", [0.5]),
        ("std", [0.2, 0.0, 0.2]),
        ("backend", "ffcv"),
        ("decode", "tpu"),
        ("num_workers", -1),
        ("subset", "0"),
        ("holdout", 1.0),
    ],
)
def test_an_impossible_value_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"data\.{field} must be"):
        FolderDataConfig(**{field: value})


@pytest.mark.parametrize("config", [FolderDataConfig, DigitsDataConfig, SyntheticDataConfig, AugmentConfig])
def test_every_config_survives_omegaconf(config: type) -> None:
    made = OmegaConf.to_object(OmegaConf.structured(config))
    assert made == config()


def test_the_fill_of_warps_is_the_mean_in_grey_levels() -> None:
    assert picture_spec(FolderDataConfig(), AugmentConfig()).fill == (124, 116, 104)


def test_validation_takes_the_recipes_interpolation_and_nothing_else(picture_root: Path) -> None:
    config = FolderDataConfig(root=str(picture_root), backend="torch", num_workers=0, image_px=32)
    source = open_data(config)
    sharp, soft, default = (
        build_loader(config, source.val, "val", augment, batch_per_device=15)
        for augment in (AugmentConfig(), AugmentConfig(interpolation="bilinear", hflip_prob=1.0), None)
    )
    (first,), (second,), (third,) = sharp, soft, default
    assert torch.equal(first.images, third.images)
    assert not torch.equal(first.images, second.images)
    assert (first.images.float() - second.images.float()).abs().mean() < 5, "a flip would be further away"


def test_training_images_without_a_recipe_are_made_like_validation_images(picture_root: Path) -> None:
    config = FolderDataConfig(root=str(picture_root), backend="torch", num_workers=0, image_px=32)
    index = open_data(config).train
    train = build_loader(config, index, "train", None, batch_per_device=21)
    listed = build_loader(config, index, "val", None, batch_per_device=21)
    (shuffled,), (in_order,) = train, listed
    assert torch.equal(shuffled.images, in_order.images[shuffled.indices])
    assert not torch.equal(shuffled.indices, in_order.indices)


def test_the_torch_back_end_is_built_where_it_is_asked_for(picture_root: Path) -> None:
    config = FolderDataConfig(root=str(picture_root), backend="torch", num_workers=0, image_px=32)
    loader = build_loader(config, open_data(config).train, "train", AugmentConfig(), batch_per_device=2)
    assert isinstance(loader, TorchLoader)


def test_the_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(16)), raising=False)
    assert [cores_of_rank(ranks) for ranks in (1, 2, 5, 64)] == [16, 8, 3, 1]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert cores_of_rank(8) == 6


def test_a_source_describes_itself_in_one_line(picture_root: Path) -> None:
    source = open_data(FolderDataConfig(root=str(picture_root)))
    assert source.describe() == (f"imagenet: 21 training and 15 validation images of 3 classes in {picture_root}")
    assert source.fingerprint != open_data(SyntheticDataConfig(num_images=21, num_val_images=15)).fingerprint


def test_a_source_says_what_was_chosen_of_its_images(picture_root: Path) -> None:
    source = open_data(FolderDataConfig(root=str(picture_root), subset="0.5", holdout=0.25))
    assert source.describe().split("\n") == [
        f"imagenet (0.25 of train/ held out): 9 training and 3 validation images of 3 classes in {picture_root}",
        "data.subset=0.5: 12 of 21 training images",
        "data.holdout=0.25: 3 images of train/ validate and do not train; val/ is not looked at",
    ]
    assert source.held_out
    assert source.fingerprint != open_data(FolderDataConfig(root=str(picture_root), subset="0.5")).fingerprint


def test_a_share_may_be_typed_as_a_number() -> None:
    for written in (0.01, "0.01", 1e-2):
        assert resolve({"subset": written}, FolderDataConfig, where="data").subset == "0.01"


def test_the_split_that_is_not_needed_need_not_be_there(picture_root: Path, tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / split).symlink_to(picture_root / split)
    held_out = FolderDataConfig(root=str(tmp_path / "train"), holdout=0.2)
    source = open_data(held_out)
    assert (len(source.train), len(source.val)) == (18, 3)
    assert held_out.open_val().val.fingerprint == source.val.fingerprint
    assert len(FolderDataConfig(root=str(tmp_path / "val"), subset="nowhere.txt").open_val().val) == 15
    for wrong in (
        FolderDataConfig(root=str(tmp_path / "train")),
        FolderDataConfig(root=str(tmp_path / "val"), holdout=0.2),
    ):
        with pytest.raises(MissingPathError, match="is missing, found"):
            open_data(wrong)


def test_the_digits_can_be_chosen_from_as_well(digits_cache: Path) -> None:
    source = open_data(DigitsDataConfig(subset="0.1", holdout=0.1))
    assert (len(source.train), len(source.val), source.num_classes) == (130, 13, 10)
