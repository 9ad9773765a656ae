"""From a data config to what the commands use: the indexes of a data set, and a loader for one split and rank."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from fat_train.augment.policy import AugmentConfig
from fat_train.data.digits import digits_root
from fat_train.data.index import SPLITS, FileIndex
from fat_train.data.layout import scan_splits
from fat_train.data.loader import Loader
from fat_train.data.order import Order
from fat_train.data.picture import PictureSpec
from fat_train.data.selection import Choice, select
from fat_train.data.synthetic import SyntheticLoader, synthetic_index
from fat_train.data.torch_folder import TorchLoader
from fat_train.types import UserError

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
class FilesDataConfig(DataConfig, Choice, ABC):
    """Images that lie on disk, of which some may be chosen."""

    def __post_init__(self) -> None:
        DataConfig.__post_init__(self)
        Choice.__post_init__(self)

    @abstractmethod
    def folder(self) -> str | None:
        """Where the images lie."""

    def open(self) -> DataSource:
        """List the images; `scan_splits` and `select` say what is refused. With a holdout val/ need not be there."""
        return self._source(("train",) if self.holdout else SPLITS)

    def open_val(self) -> DataSource:
        """List what is validated on, twice; train/ need not be there, unless the validation images come out of it."""
        source = self._source(("train",) if self.holdout else ("val",))
        return replace(source, train=source.val)

    def _source(self, splits: Sequence[str]) -> DataSource:
        chosen = select(dict(zip(splits, scan_splits(self.folder(), splits), strict=True)), self)
        name = f"{self.name} ({self.holdout:g} of train/ held out)" if self.holdout else self.name
        val = chosen.splits["val"]
        return DataSource(name, chosen.splits.get("train", val), val, tuple(chosen.notes), held_out=self.holdout > 0)


@dataclass(frozen=True, kw_only=True)
class FolderDataConfig(FilesDataConfig):
    """ImageNet, or anything laid out like it: see `fat_train.data.layout` for how it may lie."""

    name: str = "imagenet"
    """Name in logs and tables."""
    root: str | None = None
    """Folder that holds train/ and val/ (of class folders or of tar shards), or what Kaggle's archive unpacks to."""

    def folder(self) -> str | None:
        """What the user gave."""
        return self.root


@dataclass(frozen=True, kw_only=True)
class DigitsDataConfig(FilesDataConfig):
    """scikit-learn's scanned digits as a folder of JPEG files."""

    name: str = "digits"
    """Name in logs and tables."""
    image_px: int = 64
    """Height and width of the network's input, pixels."""
    eval_resize_px: int = 64
    """Shorter side before the centre crop of validation, pixels."""

    def folder(self) -> str:
        """Our own, where the files are written if they are not there yet."""
        return str(digits_root())


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

    def open_val(self) -> DataSource:
        """The same: naming costs nothing."""
        return self.open()


@dataclass(frozen=True)
class DataSource:
    """An opened data set."""

    name: str
    train: FileIndex
    val: FileIndex
    notes: tuple[str, ...] = ()
    """What was chosen of the images found, a line a setting."""
    held_out: bool = False
    """Whether the validation images are some of train/."""

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
        """For the log: a line with name, counts and place, and one for each choice that was made."""
        counts = (
            f"{self.name}: {len(self.train):,} training and {len(self.val):,} validation images "
            f"of {self.num_classes:,} classes in {self.root}"
        )
        return "\n".join((counts, *self.notes))


class Backend(NamedTuple):
    """What reads the images, and why."""

    name: str
    """dali or torch."""
    decode: str
    """cpu or gpu."""
    reason: str
    """One sentence for the log."""


def open_data(config: FolderDataConfig | DigitsDataConfig | SyntheticDataConfig) -> DataSource:
    """List the images of a data set, and check what was listed.

    Raises:
        UserError: see `fat_train.data.layout.scan_pair` and `fat_train.data.selection.select`.
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
        UserError: fewer training images than a global batch, more copies of an image (`augment.repeats`) than fit into
            one, or a back end that cannot be had.
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
        repeats=augment.repeats if train and augment is not None else 1,
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
        interpolation=DEFAULT_INTERPOLATION if augment is None else augment.eval_interpolation,
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
