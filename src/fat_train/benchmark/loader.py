"""Loaders side by side: the same files, the same size of picture, the same cores."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment
from timm.data import create_loader as create_timm_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from fat_train.augment.policy import AugmentConfig, RandAugment
from fat_train.benchmark.race import Contestant, Stream
from fat_train.data.datamodule import DataConfig, build_loader, picture_spec
from fat_train.data.index import FileIndex
from fat_train.data.inputs import InputLoader
from fat_train.data.layout import checked_root, scan_folder, scan_splits
from fat_train.types import UserError

CPU = torch.device("cpu")
RECIPES: dict[str, AugmentConfig | None] = {
    "crop": AugmentConfig(auto_augment=None, erase_prob=0.0),
    "full": AugmentConfig(),
    "eval": None,
}
"""What is made of each file; None is validation's resize and centre crop."""
FFCV_JPEG_QUALITY = 90


@dataclass(frozen=True, kw_only=True)
class ImagesConfig:
    """Which images, and what size of picture is made of them."""

    root: str | None = None
    """Folder that holds train/<class>/, or the class folders themselves."""
    packed: str | None = None
    """Folder that `pack` made of the same images, for the contestants that read it."""
    image_px: int = 224
    """Height and width of the pictures, pixels."""
    eval_resize_px: int = 256
    """Shorter side before the centre crop of `eval`, pixels."""
    at_most: int = 4096
    """Files that are used, spread evenly over the list; they are read into the page cache first."""

    def __post_init__(self) -> None:
        if self.at_most < 1:
            raise UserError(f"data.at_most must be at least 1; got {self.at_most}")
        self.spec()

    def spec(self) -> DataConfig:
        """Sizes, and the mean and deviation of ImageNet."""
        return DataConfig(name="benchmark", image_px=self.image_px, eval_resize_px=self.eval_resize_px)

    def open(self) -> FileIndex:
        """The files to read.

        Raises:
            UserError: see `scan_folder`.
        """
        folder = checked_root(self.root)
        split = "train"
        if not (folder / split).is_dir():
            split = "val" if (folder / "val").is_dir() else ""
        return self._some_of(scan_folder(folder, split))

    def open_packed(self) -> FileIndex | None:
        """As many of the packed images, if there are any.

        Raises:
            UserError: see `scan_splits`.
        """
        if self.packed is None:
            return None
        (index,) = scan_splits(self.packed, ("train",))
        return self._some_of(index)

    def _some_of(self, index: FileIndex) -> FileIndex:
        rows = np.linspace(0, len(index) - 1, min(len(index), self.at_most)).round().astype(np.int64)
        return index.take(rows)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every contestant is given."""

    index: FileIndex
    """The files, each once."""
    packed: FileIndex | None
    """The same, packed."""
    repeats: int
    """How often an epoch goes through them."""
    recipe: str
    """One of `RECIPES`."""
    batch_size: int
    workers: int
    """Threads or processes."""
    data: DataConfig

    @property
    def augment(self) -> AugmentConfig | None:
        """The recipe's values."""
        return RECIPES[self.recipe]

    @property
    def files(self) -> FileIndex:
        """An epoch's files."""
        return self.epoch_of(self.index)

    def epoch_of(self, index: FileIndex) -> FileIndex:
        """Each image as often as an epoch takes it."""
        return index.take(np.tile(np.arange(len(index)), self.repeats))

    def samples(self) -> list[tuple[str, int]]:
        """An epoch's files as torchvision and timm list them."""
        files = self.files
        return [(str(files.place(row)), int(target)) for row, target in enumerate(files.targets)]


def contestants_of(names: Iterable[str], job: Job) -> list[Contestant]:
    """The contestants that a race takes."""
    return [Contestant(name, partial(_open, name, job)) for name in names]


def _open(name: str, job: Job) -> Stream:
    if name not in OURS:  # they run as they do without us
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"
    return OPENERS[name](job)


def _stream(batches: Iterator[Tensor], files: Iterable[str]) -> Stream:
    """Take the first batch, which says what comes out; `files` are those the library itself says that it reads."""
    first = next(batches)
    listed = sorted(files)
    digest = hashlib.sha256("\n".join(listed).encode(errors="surrogateescape")).hexdigest()
    facts = {"shape": list(first.shape), "dtype": str(first.dtype), "images": len(listed), "files": digest}
    return Stream((len(batch) for batch in batches), facts)


def _epochs(loader: Iterable[Any]) -> Iterator[Tensor]:
    while True:
        for images, *_ in loader:
            yield images


def _packed(job: Job, *, normalize: bool) -> Stream:
    if job.packed is None:
        raise UserError("data.packed=<folder that pack made> is not given")
    return _ours(replace(job, index=job.packed), backend="dali", normalize=normalize)


def _ours(job: Job, *, backend: str, normalize: bool) -> Stream:
    config = DataConfig(**{**job.data.__dict__, "backend": backend, "decode": "cpu", "num_workers": job.workers})
    split = "val" if job.augment is None else "train"
    loader = build_loader(config, job.files, split, job.augment, batch_per_device=job.batch_size)
    inputs = InputLoader(loader, config.mean, config.std, CPU) if normalize else loader

    def batches() -> Iterator[Tensor]:
        for epoch in itertools.count():
            inputs.set_epoch(epoch)
            for images, *_ in inputs:
                yield images

    return _stream(batches(), (str(loader.index.place(row)) for row in range(len(loader.index))))


def _posterize_of_one_bit(image: Image.Image, bits: int, **arguments: Any) -> Image.Image:
    """Keep a bit where timm's strongest level keeps none: newer Pillows refuse that, and the recipe would not run."""
    return auto_augment.posterize(image, max(1, bits), **arguments)


def _timm(job: Job, *, normalize: bool) -> Stream:
    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize_of_one_bit
    reader = ReaderImageFolder(str(job.index.root))
    reader.samples = job.samples()
    augment, data = job.augment, job.data
    recipe: dict[str, Any] = {}
    if augment is not None:
        recipe = {
            "scale": tuple(augment.crop_scale),
            "ratio": tuple(augment.crop_ratio),
            "hflip": augment.hflip_prob,
            "color_jitter": None,
            "auto_augment": augment.auto_augment,
            "re_prob": augment.erase_prob,
            "re_mode": augment.erase_mode,
        }
    loader = create_timm_loader(
        ImageDataset(str(job.index.root), reader=reader),
        input_size=(3, data.image_px, data.image_px),
        batch_size=job.batch_size,
        is_training=augment is not None,
        interpolation="bicubic",
        mean=tuple(data.mean),
        std=tuple(data.std),
        crop_pct=data.image_px / data.eval_resize_px,
        num_workers=job.workers,
        device=CPU,
        use_prefetcher=True,
        **recipe,
    )
    return _stream(_epochs(loader if normalize else loader.loader), (path for path, _ in reader.samples))


def _torchvision(job: Job) -> Stream:
    folder = ImageFolder(str(job.index.root), transform=_torchvision_transform(job))
    folder.samples = folder.imgs = job.samples()
    train = job.augment is not None
    loader = DataLoader(
        folder,
        batch_size=job.batch_size,
        shuffle=train,
        drop_last=train,
        num_workers=job.workers,
        persistent_workers=True,
    )
    return _stream(_epochs(loader), (path for path, _ in folder.samples))


def _torchvision_transform(job: Job) -> v2.Transform:
    """As torchvision's guide has it: to a tensor first, 8-bit until the end."""
    augment, data = job.augment, job.data
    bicubic = InterpolationMode.BICUBIC
    fill = list(picture_spec(data, None).fill)
    steps: list[v2.Transform] = [v2.ToImage()]
    if augment is None:
        steps += [v2.Resize(data.eval_resize_px, bicubic, antialias=True), v2.CenterCrop(data.image_px)]
    else:
        scale, ratio = tuple(augment.crop_scale), tuple(augment.crop_ratio)
        steps += [v2.RandomResizedCrop(data.image_px, scale, ratio, bicubic, antialias=True)]
        steps += [v2.RandomHorizontalFlip(augment.hflip_prob)]
    asked = None if augment is None else augment.policy
    if isinstance(asked, RandAugment):
        # Of 31 levels; bilinear warps, since its tensors know no bicubic ones.
        level = round(asked.magnitude * 3)
        steps += [v2.RandAugment(asked.num_ops, level, interpolation=InterpolationMode.BILINEAR, fill=fill)]
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
    if augment is not None and augment.erase_prob > 0:
        steps += [v2.RandomErasing(augment.erase_prob, value="random")]
    return v2.Compose(steps)


def _dali_stock(job: Job) -> Stream:
    from fat_train.data.dali.stock import StockLoader  # noqa: PLC0415  # DALI is not installed everywhere

    samples = job.samples()
    spec = picture_spec(job.data, job.augment)
    loader = StockLoader(
        samples, job.augment, spec, job.data.mean, job.data.std, batch_size=job.batch_size, num_threads=job.workers
    )
    return _stream(_epochs(loader), loader.files)


def _ffcv(job: Job) -> Stream:
    """From a file in its own format that holds the pictures in full size, as JPEGs again."""
    if importlib.util.find_spec("ffcv") is None:
        raise UserError("FFCV is not installed")
    if job.augment is not None and job.augment.auto_augment is not None:
        raise UserError("FFCV has no RandAugment")
    from ffcv import transforms  # noqa: PLC0415
    from ffcv.fields import IntField, RGBImageField, rgb_image  # noqa: PLC0415
    from ffcv.fields.decoders import IntDecoder  # noqa: PLC0415
    from ffcv.loader import Loader, OrderOption  # noqa: PLC0415
    from ffcv.writer import DatasetWriter  # noqa: PLC0415

    data, px = job.data, job.data.image_px
    size = (px, px)
    folder = tempfile.TemporaryDirectory(prefix="fat_train_ffcv.")
    packed = Path(folder.name) / "images.beton"
    fields = {
        "image": RGBImageField(write_mode="jpg", jpeg_quality=FFCV_JPEG_QUALITY),
        "target": IntField(),
    }
    images = ImageFolder(str(job.index.root))
    images.samples = [(str(job.index.place(row)), int(target)) for row, target in enumerate(job.index.targets)]
    with redirect_stderr(io.StringIO()):  # its bar
        DatasetWriter(str(packed), fields, num_workers=1).from_indexed_dataset(images, chunksize=50)
    steps: list[Any]
    if job.augment is None:
        steps = [rgb_image.CenterCropRGBImageDecoder(size, ratio=px / data.eval_resize_px)]
    else:
        scale, ratio = tuple(job.augment.crop_scale), tuple(job.augment.crop_ratio)
        steps = [rgb_image.RandomResizedCropRGBImageDecoder(size, scale, ratio)]
        steps += [transforms.RandomHorizontalFlip(job.augment.hflip_prob)]
    mean, std = (255 * np.array(values) for values in (data.mean, data.std))
    steps += [transforms.NormalizeImage(mean, std, np.float32), transforms.ToTensor()]
    steps += [transforms.ToTorchImage(convert_back_int16=False)]
    rows = np.tile(np.arange(len(images)), job.repeats)
    loader = Loader(
        str(packed),
        batch_size=job.batch_size,
        num_workers=job.workers,
        os_cache=True,
        indices=rows,
        order=OrderOption.SEQUENTIAL if job.augment is None else OrderOption.RANDOM,
        drop_last=job.augment is not None,
        pipelines={"image": steps, "target": [IntDecoder(), transforms.ToTensor()]},
    )

    def batches() -> Iterator[Tensor]:
        with folder:  # kept until the stream ends
            yield from _epochs(loader)

    return _stream(batches(), (images.samples[row][0] for row in loader.indices))


OPENERS: dict[str, Callable[[Job], Stream]] = {
    "dali": partial(_ours, backend="dali", normalize=True),
    "torch": partial(_ours, backend="torch", normalize=True),
    "timm": partial(_timm, normalize=True),
    "torchvision": _torchvision,
    "dali_stock": _dali_stock,
    "ffcv": _ffcv,
    "dali_uint8": partial(_ours, backend="dali", normalize=False),
    "torch_uint8": partial(_ours, backend="torch", normalize=False),
    "timm_uint8": partial(_timm, normalize=False),
    "dali_packed": partial(_packed, normalize=True),
    "dali_packed_uint8": partial(_packed, normalize=False),
}
"""Those that end in _uint8 leave the normalising to the training device, as a run on a GPU does."""

OURS = ("dali", "torch", "dali_uint8", "torch_uint8", "dali_packed", "dali_packed_uint8")

BASELINE = {"": "timm", "_uint8": "timm_uint8"}
"""By the ending of its name, whom a contestant is compared with."""


def baseline_of(name: str) -> str:
    """The contestant that this one's ratio is to."""
    return BASELINE["_uint8" if name.endswith("_uint8") else ""]


NOTES = (
    "All read the same files from the page cache, with as many threads (dali) or processes (others) as there are "
    "workers, and yield float32 batches that are normalised and erased, on the CPU. The names that end in _uint8 leave "
    "that to the training device, as on a GPU; their ratio is to timm_uint8.",
    "A ratio is the median over the rounds of each round's own. Turns go round all recipes and contestants, and "
    "batches that were made ahead are thrown away before the clock starts.",
    "torchvision: tensors, bilinear warps, its own RandAugment (every operation is carried out; timm's with p = 0.5). "
    "dali_stock: DALI's RandAugment (likewise) and zeros in erased rectangles. dali_packed: from the shards of `pack`. "
    "ffcv: its own file of the same pictures as JPEGs of quality 90, resized without antialiasing. timm's posterize "
    "keeps a bit at least.",
)
"""What has to be said under a table."""
