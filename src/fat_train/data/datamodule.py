"""From a data config to what the commands use: the indexes of a data set, and a loader for one split and rank."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.digits import digits_root
from fat_train.data.index import SPLITS, FileIndex, scan_pair
from fat_train.data.loader import Loader
from fat_train.data.order import Order
from fat_train.data.picture import PictureSpec
from fat_train.data.shard import has_shards, scan_shards
from fat_train.data.synthetic import SyntheticLoader, synthetic_index
from fat_train.data.torch_folder import TorchLoader
from fat_train.types import MissingPathError, UserError

BACKENDS = ("auto", "dali", "torch")
DECODERS = ("auto", "cpu", "gpu")
DEFAULT_INTERPOLATION = "bicubic"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What every data set has: the size of its pictures and how they are read."""

    name: str
    """Name in logs and tables."""
    image_px: int = 224
    """Height and width of the network's input, pixels."""
    eval_resize_px: int = 256
    """Shorter side before the centre crop of validation, pixels."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel of RGB in [0, 1], for normalising; also what rotations and shifts fill in."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of each channel of RGB in [0, 1], for normalising."""
    backend: str = "auto"
    """What reads the files: dali, torch (PIL and timm, the reference), or auto (dali where it is installed)."""
    decode: str = "auto"
    """Where dali decodes and augments: cpu, gpu, or auto (the GPU where the training device is one)."""
    num_workers: int | None = None
    """Threads (dali) or processes (torch) of each rank; null takes this rank's share of the cores."""

    def __post_init__(self) -> None:
        if self.image_px < 1:
            raise UserError(f"data.image_px must be at least 1; got {self.image_px}")
        if self.eval_resize_px < self.image_px:
            raise UserError(
                f"data.eval_resize_px must be at least data.image_px={self.image_px}; got {self.eval_resize_px}"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"data.{name} must be three numbers, one a channel of RGB; got {getattr(self, name)}")
        if min(self.std) <= 0:
            raise UserError(f"data.std must be positive; got {self.std}")
        for name, allowed in (("backend", BACKENDS), ("decode", DECODERS)):
            if getattr(self, name) not in allowed:
                raise UserError(f"data.{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.num_workers is not None and self.num_workers < 0:
            raise UserError(f"data.num_workers must be at least 0, or null; got {self.num_workers}")


@dataclass(frozen=True, kw_only=True)
class FolderDataConfig(DataConfig):
    """Images in train/<class>/ and val/<class>/: ImageNet, or anything laid out like it."""

    name: str = "imagenet"
    """Name in logs and tables."""
    root: str | None = None
    """Folder that holds train/ and val/."""

    def open(self) -> DataSource:
        """List the images, see `scan_pair` for what is refused."""
        train, val = scan_pair(self.root)
        return DataSource(self.name, train, val)


@dataclass(frozen=True, kw_only=True)
class PackedDataConfig(DataConfig):
    """Images in tar shards of WebDataset naming: what `pack` writes, or anybody's."""

    name: str = "imagenet_packed"
    """Name in logs and tables."""
    root: str | None = None
    """Folder that holds train/*.tar and val/*.tar, or both kinds in one with "train" and "val" in their names."""

    def open(self) -> DataSource:
        """List the shards, see `scan_shards` for what is refused."""
        train, val = self._scan(SPLITS)
        return DataSource(self.name, train, val)

    def open_val(self) -> DataSource:
        """The validation shards alone, twice: those of training need not be there."""
        (val,) = self._scan(("val",))
        return DataSource(self.name, val, val)

    def _scan(self, splits: Sequence[str]) -> tuple[FileIndex, ...]:
        if not self.root or self.root == "???":
            raise UserError("data.root is not set: give the folder of shards that pack wrote, as data.root=<folder>")
        folder = Path(self.root).expanduser()
        if not folder.is_dir():
            raise MissingPathError(f"data.root={folder} is not a folder: give the one that pack wrote its shards into")
        if not has_shards(folder):
            raise UserError(
                f"data.root={folder} holds no tar shards (train/*.tar and val/*.tar): for images in class folders "
                f"choose data=imagenet; to pack them, python -m fat_train pack data.root={folder} out=<folder>"
            )
        return scan_shards(folder, splits)


@dataclass(frozen=True, kw_only=True)
class DigitsDataConfig(DataConfig):
    """scikit-learn's scanned digits as a folder of JPEG files."""

    name: str = "digits"
    """Name in logs and tables."""
    image_px: int = 64
    """Height and width of the network's input, pixels."""
    eval_resize_px: int = 64
    """Shorter side before the centre crop of validation, pixels."""

    def open(self) -> DataSource:
        """Write the files where they are not there yet, and list them."""
        train, val = scan_pair(str(digits_root()))
        return DataSource(self.name, train, val)


@dataclass(frozen=True, kw_only=True)
class SyntheticDataConfig(DataConfig):
    """Images made in memory, for speed measurements and dry runs."""

    name: str = "synthetic"
    """Name in logs and tables."""
    num_images: int = 1_281_167
    """Training images in an epoch."""
    num_val_images: int = 50_000
    """Validation images."""
    num_classes: int = 1000
    """Classes, in equal shares."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_images", "num_val_images", "num_classes"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1; got {getattr(self, name)}")

    def open(self) -> DataSource:
        """Name the images."""
        train, val = (
            synthetic_index(count, self.num_classes, split)
            for split, count in zip(SPLITS, (self.num_images, self.num_val_images), strict=True)
        )
        return DataSource(self.name, train, val)


@dataclass(frozen=True)
class DataSource:
    """An opened data set."""

    name: str
    train: FileIndex
    val: FileIndex

    @property
    def num_classes(self) -> int:
        """Classes, the same in both splits."""
        return len(self.train.classes)

    @property
    def root(self) -> Path:
        """The folder that holds both splits."""
        folder = self.train.root
        return folder.parent if folder.name in SPLITS else folder  # shards of both splits may lie in one

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex over the lists of both splits."""
        return hashlib.sha256(f"{self.train.fingerprint} {self.val.fingerprint}".encode()).hexdigest()

    def describe(self) -> str:
        """One line for the log: name, counts, place."""
        return (
            f"{self.name}: {len(self.train):,} training and {len(self.val):,} validation images "
            f"of {self.num_classes:,} classes in {self.root}"
        )


class Backend(NamedTuple):
    """What reads the images, and why."""

    name: str
    """dali or torch."""
    decode: str
    """cpu or gpu."""
    reason: str
    """One sentence for the log."""


def open_data(config: FolderDataConfig | PackedDataConfig | DigitsDataConfig | SyntheticDataConfig) -> DataSource:
    """List the images of a data set, and check what was listed.

    Raises:
        UserError: see `fat_train.data.index.scan_pair`.
    """
    return config.open()


def choose_backend(requested: str, device: torch.device, decode: str = "auto") -> Backend:
    """Settle `data.backend` and `data.decode` by what there is.

    Raises:
        UserError: dali is asked for and not installed, or GPU decoding is asked for and cannot be had.
    """
    dali_there = _dali_is_installed()
    if requested == "dali" and not dali_there:
        raise UserError(f"data.backend=dali needs NVIDIA DALI, which {_WHY_NO_DALI}; data.backend=torch works without")
    name = "dali" if requested == "dali" or (requested == "auto" and dali_there) else "torch"
    if decode == "gpu" and (name != "dali" or device.type != "cuda"):
        raise UserError(f"data.decode=gpu needs data.backend=dali and a CUDA device; got {name} and {device.type}")
    if name == "torch":
        why = "data.backend asks for it" if requested == "torch" else f"DALI {_WHY_NO_DALI}"
        return Backend("torch", "cpu", f"images are read by PIL in torch workers: {why}")
    if decode == "gpu" or (decode == "auto" and device.type == "cuda"):
        return Backend("dali", "gpu", f"images are decoded and augmented by DALI on {device}")
    why = "data.decode asks for it" if decode == "cpu" else "the training device is no GPU"
    return Backend("dali", "cpu", f"images are decoded and augmented by DALI on the CPU: {why}")


_WHY_NO_DALI = "is not installed (it has wheels for Linux alone)"


def _dali_is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the package `nvidia`
        return False


def build_loader(
    config: DataConfig,
    index: FileIndex,
    split: str,
    augment: AugmentConfig | None,
    *,
    batch_per_device: int,
    accumulate: int = 1,
    rank: int = 0,
    world_size: int = 1,
    local_world_size: int = 1,
    seed: int = 0,
    device: torch.device | None = None,
) -> Loader:
    """Build the loader of one split for one rank.

    Args:
        config: the data set's.
        index: `DataSource.train` or `.val`.
        split: `train` (a permutation each epoch, the incomplete step dropped, augmented) or `val` (each image once).
        augment: the recipe. In validation only its interpolation counts; without one, training images are made as
            validation images are, and the interpolation is bicubic.
        batch_per_device: images of a micro-batch.
        accumulate: micro-batches of an optimiser step.
        rank: this process among all, over all nodes.
        world_size: processes over all nodes.
        local_world_size: processes on this node, which share its cores.
        seed: of the order and of the augmentation, the same on every rank.
        device: where the model is; None means the CPU.

    Raises:
        UserError: fewer training images than a global batch, or a back end that cannot be had.
    """
    assert split in SPLITS
    train = split == "train"
    order = Order(
        num_images=len(index),
        batch_per_device=batch_per_device,
        accumulate=accumulate if train else 1,
        rank=rank,
        world_size=world_size,
        seed=seed,
        train=train,
    )
    recipe = augment if train else None
    if isinstance(config, SyntheticDataConfig):
        return SyntheticLoader(index, order, recipe, config.image_px)
    device = device or torch.device("cpu")
    backend = choose_backend(config.backend, device, config.decode)
    workers = config.num_workers if config.num_workers is not None else cores_of_rank(local_world_size)
    spec = picture_spec(config, augment)
    if backend.name == "torch":
        pin_memory = device.type == "cuda"
        return TorchLoader(index, order, recipe, spec, num_workers=workers, pin_memory=pin_memory)
    from fat_train.data.dali.loader import DaliLoader  # noqa: PLC0415  # DALI is not installed everywhere

    gpu = device if backend.decode == "gpu" else None
    return DaliLoader(index, order, recipe, spec, num_threads=max(1, workers), gpu=gpu)


def picture_spec(config: DataConfig, augment: AugmentConfig | None) -> PictureSpec:
    """Gather what the picture making back ends need to know."""
    red, green, blue = (min(255, round(255 * mean)) for mean in config.mean)
    ratio = (1.0, 1.0) if augment is None else (augment.crop_ratio[0], augment.crop_ratio[1])
    return PictureSpec(
        image_px=config.image_px,
        eval_resize_px=config.eval_resize_px,
        interpolation=DEFAULT_INTERPOLATION if augment is None else augment.interpolation,
        crop_ratio=ratio,
        fill=(red, green, blue),
    )


def cores_of_rank(local_world_size: int) -> int:
    """Count the cores that one of this node's ranks may use for reading images."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    of_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if of_task:  # one rank is one SLURM task, whose cores are its own
        return max(1, min(available, int(of_task)))
    return max(1, available // local_world_size)
