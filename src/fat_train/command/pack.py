"""pack: a data set as tar shards of smaller pictures, for disks and decoders that are too slow for the original."""

from __future__ import annotations

from omegaconf import DictConfig
from rich.console import Console

from fat_train.command.assemble import split_settings
from fat_train.command.say import say, this_python
from fat_train.config.resolve import refuse_unknown, resolve
from fat_train.config.run import plain
from fat_train.data.datamodule import DataConfig, SyntheticDataConfig, cores_of_rank, open_data
from fat_train.data.pack import Packed, PackSettings, pack
from fat_train.types import UserError


def run(tree: DictConfig) -> Packed:
    """Pack, or go on with a packing that was broken off; says what there is in the end.

    Raises:
        UserError: as `fat_train.data.pack.pack`; synthetic images are asked for; sides that training would enlarge.
    """
    settings, values = split_settings(plain(tree), PackSettings)
    refuse_unknown(values, ("data", *PackSettings.__dataclass_fields__), where="")
    data = resolve(values["data"], where="data")
    _refuse_enlarging(settings, data)
    if isinstance(data, SyntheticDataConfig):
        raise UserError("data=synthetic has no files to pack: choose another data=")
    source = open_data(data)
    say(f"data           {source.describe()}")
    packed = pack(source.train, source.val, settings, settings.num_workers or cores_of_rank(1), Console())
    if packed.repacked:
        say(f"packed anew    {', '.join(packed.repacked)}: gone, or of another size, since they were written")
    _say_what_there_is(packed, settings, data)
    return packed


def _refuse_enlarging(settings: PackSettings, data: DataConfig) -> None:
    for name, least in (("short_side_px", "image_px"), ("val_short_side_px", "eval_resize_px")):
        side, needed = getattr(settings, name), getattr(data, least)
        if side is not None and side < needed:
            raise UserError(f"{name}={side} is under data.{least}={needed}: every picture would be enlarged again")


def _say_what_there_is(packed: Packed, settings: PackSettings, data: DataConfig) -> None:
    say(
        f"packed         {packed.images:,} images, {_size(packed.source_bytes)} -> {_size(packed.bytes)} "
        f"in {packed.shards:,} shards, {packed.seconds:,.0f} s{', verified' if settings.verify else ''}"
    )
    words = [f"data.root={settings.out}"]
    words += [f"data.{name}={getattr(data, name)}" for name in ("image_px", "eval_resize_px")
              if getattr(data, name) != getattr(DataConfig, name)]  # fmt: skip
    say(f"next           {this_python()} -m fat_train data=imagenet_packed {' '.join(words)}")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
