"""How the depth-wise kernels divide a map: by defaults that follow from the sizes alone, or as was measured to be the
fastest (`prefer`).

Of the forward pass and the input gradient a tile changes the speed alone: every output is summed in the same order
under all of them. Of the weight gradient it changes that order, so equal bits want an equal choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import NamedTuple

import torch

Shape = tuple[int, ...]
Key = tuple[str | int, ...]
ENOUGH_PROGRAMS = 512
"""That keep a large GPU (132 multiprocessors of an H200) at work; a small problem takes fewer rows a program."""
REDUCING_PROGRAMS = 1024
"""Of the weight gradient: each writes its own sums, so not many more than what the device works on at a time."""
FEWEST_ROWS = 8
"""Of a strip of the weight gradient: below that the rim costs more than the strip."""
LANES = 32
THREADS = 128
"""Of a program, where the map is large enough."""
MOST_NUMBERS = 152
"""Sums and taps of a thread, together: with more, a kernel no longer fits into 255 registers."""


class Counts(NamedTuple):
    """How many tiles cover the output of one image."""

    tiles_h: int
    tiles_w: int
    tiles_c: int

    @property
    def programs(self) -> int:
        """Of one image."""
        return self.tiles_h * self.tiles_w * self.tiles_c


class Tile(NamedTuple):
    """What a program of the forward pass or the input gradient takes, in pixels and channels of the conv's output."""

    rows: int
    columns: int
    channels: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """By their names in the kernels."""
        return {"TILE_H": self.rows, "TILE_W": self.columns, "BLOCK_C": self.channels}

    def counts(self, shape: Shape) -> Counts:
        """For an output of [B, C, h, w]."""
        _, channels, height, width = shape
        return Counts(_ceil(height, self.rows), _ceil(width, self.columns), _ceil(channels, self.channels))


class Work(NamedTuple):
    """How the weight gradient of a whole batch is divided."""

    programs: int
    tiles_w: int
    tiles_c: int
    strips: int
    """Into which the rows of a tile of columns fall."""
    strip_rows: int
    items: int
    """Strips of all images and tiles of columns: a part is the sum of some of them."""
    parts: int
    """Partial sums of each channel."""


class Strip(NamedTuple):
    """What a program of the weight gradient takes: rows of the kernel; columns and channels of the conv's output."""

    tap_rows: int
    columns: int
    channels: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """By their names in the kernel."""
        return {"TAP_ROWS": self.tap_rows, "TILE_W": self.columns, "BLOCK_C": self.channels}

    def work(self, shape: Shape, kernel_size: int) -> Work:
        """For an output of [B, C, h, w]. Every part has the same number of items, but for the last."""
        batch, channels, height, width = shape
        tiles_w, tiles_c = _ceil(width, self.columns), _ceil(channels, self.channels)
        programs_a_part = tiles_c * _ceil(kernel_size, self.tap_rows)
        wanted = max(1, REDUCING_PROGRAMS // programs_a_part)
        strips = min(_ceil(wanted, max(1, batch * tiles_w)), _ceil(height, FEWEST_ROWS))
        strip_rows = _ceil(height, strips)
        strips = _ceil(height, strip_rows)
        items = batch * tiles_w * strips
        parts = _ceil(items, _ceil(items, wanted)) if items else 1
        return Work(parts * programs_a_part, tiles_w, tiles_c, strips, strip_rows, items, parts)


_measured: dict[Key, Tile | Strip] = {}


def prefer(fastest: Mapping[Key, Tile | Strip]) -> None:
    """Take these in place of the defaults, in this process."""
    _measured.clear()
    _measured.update(fastest)


def measured() -> Mapping[Key, Tile | Strip]:
    """What takes the defaults' place now."""
    return _measured


def tile_of(key: Key, numbers: Iterable[int]) -> Tile | Strip:
    """A choice as it was written down: numbers, by the kernel that its key begins with."""
    return (Strip if key[0] == "weight_grad" else Tile)(*numbers)


def key_of(kernel: str, dtype: torch.dtype, shape: Shape, kernel_size: int, stride: int) -> Key:
    """Of a choice: for every batch size the same."""
    return (kernel, str(dtype), *shape[1:], kernel_size, stride)


def output_tile(dtype: torch.dtype, shape: Shape, kernel_size: int, stride: int) -> Tile:
    """For an output of [B, C, h, w]."""
    chosen = _measured.get(key_of("forward", dtype, shape, kernel_size, stride))
    most_rows = (14 if kernel_size <= 7 else 8) if stride == 1 else 4
    return chosen if isinstance(chosen, Tile) else _default_tile(shape, kernel_size, stride, most_rows)


def input_grad_tile(dtype: torch.dtype, shape: Shape, kernel_size: int, stride: int) -> Tile:
    """For an output of [B, C, h, w], whose gradient the kernel reads; it writes `stride` times the rows and columns."""
    chosen = _measured.get(key_of("input_grad", dtype, shape, kernel_size, stride))
    most_rows = (14 if kernel_size <= 7 else 8) if stride == 1 else 4 if kernel_size <= 5 else 2
    return chosen if isinstance(chosen, Tile) else _default_tile(shape, kernel_size, 1, most_rows)


def weight_grad_tile(dtype: torch.dtype, shape: Shape, kernel_size: int, stride: int) -> Strip:
    """For an output of [B, C, h, w]."""
    chosen = _measured.get(key_of("weight_grad", dtype, shape, kernel_size, stride))
    if isinstance(chosen, Strip):
        return chosen
    tap_rows, vector = _SUMS.get(kernel_size, (_few_sums(kernel_size),))[0]
    channels = min(_block_of_channels(shape[1]), 16 * vector)
    columns = _columns(shape[3], kernel_size, THREADS * vector // channels)
    return Strip(tap_rows, columns, channels, _warps(columns, channels, vector))


def candidates(kernel: str, dtype: torch.dtype, shape: Shape, kernel_size: int, stride: int) -> list[Tile | Strip]:
    """What is worth measuring for "forward", "input_grad" or "weight_grad" and an output of [B, C, h, w]."""
    channels = _block_of_channels(shape[1])
    columns = _columns(shape[3], kernel_size, THREADS * 4 // channels)
    places = [(columns, channels), (2 * columns, channels)]
    if channels < 64:
        places.append((columns, 2 * channels))
    if kernel == "weight_grad":
        strip = weight_grad_tile(dtype, shape, kernel_size, stride)
        sums = _SUMS.get(kernel_size, (_few_sums(kernel_size),))
        found = [Strip(rows, w, c, _warps(w, c, vector)) for (w, c), (rows, vector) in product(places, sums)]
        return list(dict.fromkeys([strip, *found]))
    reads, writes = (stride, 1) if kernel == "forward" else (1, stride)
    rows = {_best_rows(shape[2], kernel_size, reads, most) for most in (4, 8, 14)}
    fitting = [
        (r, vector)
        for r, vector in product(sorted(rows), (4, 8))
        if vector * (r * writes**2 + kernel_size * writes) <= MOST_NUMBERS
    ]
    tile = (output_tile if kernel == "forward" else input_grad_tile)(dtype, shape, kernel_size, stride)
    tiles = [Tile(r, w, c, _warps(w, c, vector)) for (w, c), (r, vector) in product(places, fitting)]
    return list(dict.fromkeys([tile, *tiles]))


_SUMS = {3: ((3, 4), (3, 8)), 5: ((5, 2), (5, 4)), 7: ((7, 2), (4, 4)), 9: ((5, 2), (9, 2))}
"""Kernel size -> rows of it and channels of a thread; the first is the default."""


def _few_sums(kernel_size: int) -> tuple[int, int]:
    return max(1, 49 // kernel_size), 2


def _default_tile(shape: Shape, kernel_size: int, stride: int, most_rows: int) -> Tile:
    channels = _block_of_channels(shape[1])
    columns = _columns(shape[3], kernel_size, THREADS * 4 // channels)
    rows = _best_rows(shape[2], kernel_size, stride, most_rows)
    tile = Tile(rows, columns, channels, _warps(columns, channels, vector=4))
    while tile.rows > 2 and shape[0] * tile.counts(shape).programs < ENOUGH_PROGRAMS:
        tile = tile._replace(rows=_ceil(tile.rows, 2))
    return tile


def _best_rows(height: int, kernel_size: int, stride: int, most: int) -> int:
    """Rows of a program with which all of them together load the fewest rows; of equals the larger number."""
    return min(range(1, most + 1), key=lambda rows: (_ceil(height, rows) * (stride * (rows - 1) + kernel_size), -rows))


def _block_of_channels(channels: int) -> int:
    """The widest block that leaves the fewest lanes idle: 16 numbers of 2 bytes are a sector of memory."""
    return min((64, 32, 16), key=lambda block: (_ceil(channels, block) * block, -block))


def _columns(width: int, kernel_size: int, most: int) -> int:
    """Columns that leave few lanes idle and read a narrow rim, which mostly comes out of a cache: by half its size."""
    return min((4, 8, 16, 32), key=lambda c: (c > most, _ceil(width, c) * (c + (kernel_size - 1) / 2)))


def _warps(columns: int, channels: int, vector: int) -> int:
    """So many that a thread holds `vector` channels of a pixel."""
    return min(8, max(1, columns * channels // (LANES * vector)))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
