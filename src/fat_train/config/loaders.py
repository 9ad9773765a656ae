"""The input pipeline by itself: `create_loader` for a loop that is not ours."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import torch
from omegaconf import DictConfig, OmegaConf

from fat_train.augment.policy import AugmentConfig
from fat_train.config.resolve import refuse_unknown, resolve
from fat_train.config.zoo import conf_dir
from fat_train.data.datamodule import BACKENDS, DECODERS, DataConfig, build_loader
from fat_train.data.index import SPLITS, FileIndex
from fat_train.data.inputs import InputLoader
from fat_train.data.layout import KEY, checked_root, scan_folder, scan_splits
from fat_train.data.loader import Loader
from fat_train.types import UserError, one_of

EVAL = "eval"
EVAL_CROP = 0.875
"""Share of the resized picture's shorter side that validation's centre crop keeps, unless `eval_resize_px` says."""
NOT_THE_LOADERS = ("mixup", "cutmix", "mix_")


def list_recipes() -> list[str]:
    """Names that `create_loader` takes as `recipe`: the yamls of conf/augment, and "eval"."""
    return [*sorted(file.stem for file in (conf_dir() / "augment").glob("*.yaml")), EVAL]


@overload
def create_loader(
    root: str | Path, *, batch_size: int, normalize: Literal[True] = True, **options: Any
) -> InputLoader: ...


@overload
def create_loader(root: str | Path, *, batch_size: int, normalize: Literal[False], **options: Any) -> Loader: ...


def create_loader(
    root: str | Path,
    *,
    batch_size: int,
    split: str | None = "train",
    recipe: str | AugmentConfig | None = None,
    image_px: int = 224,
    eval_resize_px: int | None = None,
    normalize: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str = "auto",
    decode: str = "auto",
    rank: int | None = None,
    world_size: int | None = None,
    seed: int = 0,
    num_workers: int | None = None,
    device: str | torch.device | None = None,
    **overrides: Any,
) -> InputLoader | Loader:
    """Build a loader of one split of a data set, for one rank.

    Call `set_epoch(epoch)` before each epoch; `state_dict()` and `load_state_dict()` go on within one. Mixup and cutmix
    are the loop's (`timm.data.Mixup` takes what this yields).

    Args:
        root: the folder that holds train/ and val/, of class folders or of tar shards, or Kaggle's.
        batch_size: images of a batch of this rank.
        split: "train" or "val", whatever the recipe; None for a root that holds the class folders itself.
        recipe: how pictures are made, one of `list_recipes()` or an `AugmentConfig`; "deit" unless given, and "eval"
            for the split "val". With "eval" each image comes exactly once, in order, resized and cut out at the centre;
            with any other an epoch is a permutation of the images whose incomplete last step is dropped.
        image_px: height and width of the pictures, pixels.
        eval_resize_px: shorter side before the centre crop of "eval", pixels; image_px / 0.875 unless given.
        normalize: yield `(images, targets)` as a model takes them, float32 on `device`, normalised and erased; with
            False `Batch`es of 8-bit pixels, for `fat_train.augment.device`.
        mean: of each channel of RGB in [0, 1]; ImageNet's unless given.
        std: of each channel, likewise.
        backend: "dali", "torch", or "auto".
        decode: where DALI decodes: "cpu", "gpu", or "auto" (the GPU where `device` is one).
        rank: this process among all; torch.distributed's where that is initialised, else 0.
        world_size: processes in all; likewise, else 1.
        seed: of order and augmentation, the same on every rank.
        num_workers: threads (dali) or processes (torch); this rank's share of the cores unless given.
        device: where the model is; the CPU unless given.
        overrides: fields of `AugmentConfig` that replace the recipe's, such as `auto_augment="rand-m7"`.

    Raises:
        UserError: an unknown word, an impossible value, fewer images than a step takes.
        MissingPathError: no such folder, or no such split in it.
    """
    refuse_unknown(overrides, [*_PARAMETERS, *_FIELDS], where="")
    for name, word, allowed in (("backend", backend, BACKENDS), ("decode", decode, DECODERS), ("split", split, SPLITS)):
        if word is not None:
            one_of(name, word, allowed)
    if recipe is None:
        recipe = EVAL if split == "val" else "deit"
    train = recipe != EVAL
    augment = _augment(recipe, overrides)
    rank, world_size = _place(rank, world_size)
    if batch_size < 1 or not 0 <= seed < 2**32:
        raise UserError(
            f"batch_size must be at least 1 and seed in [0, 2**32); got batch_size={batch_size}, seed={seed}"
        )
    target = _device(device)
    given = {"mean": mean, "std": std}
    config = DataConfig(
        name="folder",
        image_px=image_px,
        eval_resize_px=round(image_px / EVAL_CROP) if eval_resize_px is None else eval_resize_px,
        backend=backend,
        decode=decode,
        num_workers=num_workers,
        **{name: [float(value) for value in values] for name, values in given.items() if values is not None},
    )
    index = _index(root, split)
    if train:
        _refuse_large_batch(batch_size, world_size, index)
    loader = build_loader(
        config,
        index,
        "train" if train else "val",
        augment,
        batch_per_device=batch_size,
        rank=rank,
        world_size=world_size,
        local_world_size=_local_world_size(world_size),
        seed=seed,
        device=target,
    )
    return InputLoader(loader, config.mean, config.std, target) if normalize else loader


def _index(root: str | Path, split: str | None) -> FileIndex:
    try:
        if split is None:
            return scan_folder(checked_root(root), "")
        (index,) = scan_splits(root, (split,))
    except UserError as error:
        raise type(error)(str(error).replace(KEY, "root")) from error
    return index


_PARAMETERS = [name for name in inspect.signature(create_loader).parameters if name != "overrides"]
_FIELDS = [field.name for field in dataclasses.fields(AugmentConfig)]


def _augment(recipe: str | AugmentConfig, overrides: dict[str, Any]) -> AugmentConfig:
    mixing = [name for name in overrides if name.startswith(NOT_THE_LOADERS)]
    if mixing:
        raise UserError(f"{mixing[0]}: a loader does not mix; give its batches to timm.data.Mixup({mixing[0]}=...)")
    if isinstance(recipe, AugmentConfig):
        values: DictConfig = OmegaConf.create(dataclasses.asdict(recipe))
        return resolve(OmegaConf.merge(values, overrides), AugmentConfig, where="")  # type: ignore[arg-type]
    one_of("recipe", recipe, list_recipes())
    if recipe == EVAL:
        unread = sorted(set(overrides) - {"interpolation"})
        if unread:
            raise UserError(f"recipe={EVAL} augments nothing and reads interpolation alone: leave out {unread[0]}")
        return AugmentConfig(**overrides)
    node = OmegaConf.load(conf_dir() / "augment" / f"{recipe}.yaml")
    return resolve(OmegaConf.merge(node, overrides), where="")  # type: ignore[arg-type]


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if rank is None:
        rank = torch.distributed.get_rank() if started else 0
    if world_size is None:
        world_size = torch.distributed.get_world_size() if started else 1
    if not 0 <= rank < world_size:
        raise UserError(f"rank must be at least 0 and less than world_size={world_size}; got rank={rank}")
    return rank, world_size


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
    except RuntimeError as error:
        raise UserError(f"device={device} is not known: give cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and not (found.index or 0) < torch.cuda.device_count():
        raise UserError(f"device={device} is not there: this machine has {torch.cuda.device_count()} CUDA devices")
    return found


def _local_world_size(world_size: int) -> int:
    """Ranks of this node: torchrun's word, else as many as it has GPUs."""
    told = os.environ.get("LOCAL_WORLD_SIZE")
    return int(told) if told else min(world_size, max(1, torch.cuda.device_count()))


def _refuse_large_batch(batch_size: int, world_size: int, index: FileIndex) -> None:
    if batch_size * world_size > len(index):
        fits = len(index) // world_size
        advice = f"batch_size={fits} or less" if fits else "fewer processes"
        raise UserError(
            f"batch_size={batch_size} x world_size={world_size} is more than the {len(index)} images in {index.root}: "
            f"give {advice}"
        )
