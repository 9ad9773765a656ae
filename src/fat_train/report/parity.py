"""How far a back end's pictures are from those of PIL and timm: each operation alone, then the whole road.

For a single operation photographs are cut to the network's size first and handed over without loss, so that nothing
but the operation differs. The warps (rotation, shears, translations) have three shares of their own: inside, where
only photograph is drawn on; the rim, where photograph meets fill; and what one fills and the other does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from rich.table import Table

from fat_train.augment.draws import BLUR_SIGMA, Draws, draw, operation_argument
from fat_train.augment.policy import NO_OP, WARPS, AugmentConfig, Op
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec, make_pictures

Lowering = Callable[[Sequence[Place], Draws | None, PictureSpec], UInt8[np.ndarray, "B H W 3"]]

LEVELS = (0.0, 5.0, 9.0, 10.0)
"""Levels, of 10, whose arguments are measured."""
CARD_LEVEL = 128
"""Grey of a card whose picture, on black fill, shows where a warp draws photograph and where fill."""
SEED = 5


class Tolerance(NamedTuple):
    """The most that may lie between two pictures, grey levels."""

    measure: str
    """`mean` over all pictures, `worst` for the mean of the picture furthest off, or `largest` of all pixels."""
    levels: float


POINT = Tolerance("largest", 1)
WARP = Tolerance("mean", 2)
BLUR = Tolerance("mean", 1)
CROP = Tolerance("worst", 1)
RECIPE = Tolerance("mean", 2)


@dataclass(frozen=True)
class Difference:
    """How far apart pictures are that one thing was done to."""

    arg: float | None
    """Argument of the operation; None where it has none."""
    mean: float
    """Of the absolute difference over all pictures, grey levels."""
    worst: float
    """The mean of the picture that is furthest off."""
    largest: int
    """Of all pixels and channels."""
    inside: float | None = None
    """Warps: the mean over pixels that fill has no part in, in either picture."""
    filled_by_one: float | None = None
    """Warps: share of the pixels that are fill in one picture and not in the other."""


@dataclass(frozen=True)
class ParityRow:
    """One operation, or one road from a file to a picture, in one back end."""

    name: str
    back_end: str
    pictures: int
    differences: tuple[Difference, ...]
    """One an argument."""
    tolerance: Tolerance | None
    """None: shown, and held to nothing."""

    def most(self, measure: str) -> float:
        """The largest value of a measure over the arguments; nan where it was not taken."""
        values = [getattr(difference, measure) for difference in self.differences]
        return np.nan if None in values else float(max(values))

    @property
    def holds(self) -> bool:
        """Whether the tolerance is kept at every argument."""
        return self.tolerance is None or self.most(self.tolerance.measure) <= self.tolerance.levels

    def as_dict(self) -> dict[str, Any]:
        """Everything that was measured, ready for JSON."""
        tolerance = None if self.tolerance is None else self.tolerance._asdict()
        return asdict(self) | {"tolerance": tolerance, "holds": self.holds}


def arguments(op: Op) -> list[float]:
    """Every argument that a level of `LEVELS` leads to, of either sign, in both of timm's sets; sorted."""
    if op == Op.GAUSSIAN_BLUR:
        return np.linspace(*BLUR_SIGMA, len(LEVELS)).tolist()
    asked = {
        float(operation_argument(np.array(op), np.array(level), np.array(sign), increasing)) + 0.0
        for level in LEVELS
        for sign in (-1.0, 1.0)
        for increasing in (False, True)
    }
    return sorted(asked)


def save_squares(places: Sequence[Place], spec: PictureSpec, folder: Path) -> list[Place]:
    """Cut each photograph as validation does and keep it without loss: files that a crop and a resize leave alone."""
    squares = []
    for number, picture in enumerate(make_pictures(places, None, spec)):
        path = folder / f"{number:03d}.bmp"
        Image.fromarray(picture).save(path)
        squares.append(Place(str(path)))
    return squares


def draws_of_one(op: int, arg: float, count: int, config: AugmentConfig, image_px: int) -> Draws:
    """The whole of each square image, unflipped, and one operation (or `NO_OP`) on it."""
    still = replace(config, auto_augment="rand-n1", crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0], hflip_prob=0.0)
    drawn = draw(still, image_px, np.random.default_rng(SEED), count)
    return replace(drawn, op=np.full((count, 1), op), arg=np.full((count, 1), arg))


def operation_rows(
    squares: Sequence[Place],
    spec: PictureSpec,
    config: AugmentConfig,
    lowerings: Mapping[str, Lowering],
    ops: Sequence[Op] = tuple(Op),
) -> list[ParityRow]:
    """Carry out each operation, at each of its arguments, on each square picture.

    Args:
        squares: pictures of `image_px`, from `save_squares`.
        spec: what they were cut by.
        config: the recipe, which says how warps interpolate.
        lowerings: the back ends to hold against PIL and timm, by name.
        ops: those to look at.
    """
    rows = []
    for op in ops:
        args = arguments(op)
        draws = stack([draws_of_one(op, arg, len(squares), config, spec.image_px) for arg in args])
        places = [*squares] * len(args)
        theirs = make_pictures(places, draws, spec)
        for name, lowering in lowerings.items():
            apart = _apart(lowering(places, draws, spec), theirs).reshape(len(args), len(squares), *theirs.shape[1:])
            shown = args if len(args) > 1 else [None]
            found = [_difference(each, arg) for each, arg in zip(apart, shown, strict=True)]
            if op in WARPS:
                cards = stack([draws_of_one(op, arg, 1, config, spec.image_px) for arg in args])
                found = _with_fill(found, apart, cards, squares[0], spec, lowering)
            tolerance = WARP if op in WARPS else BLUR if op == Op.GAUSSIAN_BLUR else POINT
            rows.append(ParityRow(name_of(op), name, len(squares), tuple(found), tolerance))
    return rows


def road_rows(
    places: Sequence[Place],
    spec: PictureSpec,
    config: AugmentConfig,
    lowerings: Mapping[str, Lowering],
    *,
    held: Sequence[str],
    repeats: int = 2,
) -> list[ParityRow]:
    """Make pictures of the files themselves: decoded, cropped and resized, then flipped, then with all of the recipe.

    Args:
        places: the photographs.
        spec: what is made of them.
        config: the recipe.
        lowerings: the back ends, by name.
        held: those that are held to the tolerances; a GPU decodes JPEG in its own way and is shown only.
        repeats: draws for each photograph.
    """
    places = [*places] * repeats
    whole = draw(config, spec.image_px, np.random.default_rng(SEED), len(places))
    crops = replace(whole, op=np.full_like(whole.op, NO_OP), flip=np.zeros(len(places), bool))
    roads: dict[str, tuple[Draws | None, Tolerance]] = {
        f"file, crop, {config.interpolation} resize": (crops, CROP),
        "the same and a flip": (replace(crops, flip=np.ones(len(places), bool)), CROP),
        "validation": (None, CROP),
        "the whole recipe": (whole, RECIPE),
    }
    rows = []
    for road, (draws, tolerance) in roads.items():
        theirs = make_pictures(places, draws, spec)
        for name, lowering in lowerings.items():
            difference = _difference(_apart(lowering(places, draws, spec), theirs), None)
            rows.append(ParityRow(road, name, len(places), (difference,), tolerance if name in held else None))
    return rows


def name_of(op: Op) -> str:
    """The operation as a table writes it."""
    return op.name.lower().replace("_", " ")


def stack(tables: Sequence[Draws]) -> Draws:
    """The rows of all tables, one after another."""
    return Draws(*(np.concatenate([getattr(table, name) for table in tables]) for name in vars(tables[0])))


def _apart(ours: UInt8[np.ndarray, ...], theirs: UInt8[np.ndarray, ...]) -> UInt8[np.ndarray, ...]:
    return np.maximum(ours, theirs) - np.minimum(ours, theirs)


def _difference(apart: UInt8[np.ndarray, "N H W 3"], arg: float | None) -> Difference:
    of_each = apart.mean(axis=(1, 2, 3))
    return Difference(arg, float(of_each.mean()), float(of_each.max()), int(apart.max()))


def _with_fill(
    found: Sequence[Difference],
    apart: UInt8[np.ndarray, "A N H W 3"],
    draws: Draws,
    square: Place,
    spec: PictureSpec,
    lowering: Lowering,
) -> list[Difference]:
    """Add the shares of the inside and of the fill, which a grey card on black fill tells apart."""
    card = Place(str(Path(square.file).with_name("card.bmp")))
    Image.new("RGB", (spec.image_px, spec.image_px), (CARD_LEVEL,) * 3).save(card.file)
    on_black = replace(spec, fill=(0, 0, 0))
    cards = [make([card] * len(found), draws, on_black)[..., 0] for make in (make_pictures, lowering)]
    inside: Bool[np.ndarray, "A H W"] = (cards[0] == CARD_LEVEL) & (cards[1] == CARD_LEVEL)
    by_one = (cards[0] == 0) != (cards[1] == 0)
    return [
        replace(one, inside=float(pixels[:, at].mean()), filled_by_one=float(share.mean()))
        for one, pixels, at, share in zip(found, apart, inside, by_one, strict=True)
    ]


def parity_table(rows: Sequence[ParityRow]) -> Table:
    """A row an operation: its worst argument, and what is allowed."""
    table = Table(title="The same picture? Difference to PIL and timm, grey levels of 255", title_justify="left")
    table.caption = (
        "Where an operation takes an argument: at the one where they differ most. worst: mean of the picture furthest "
        "off. inside: mean where fill takes no part. filled in one: pixels that are fill in one picture alone."
    )
    table.caption_justify = "left"
    table.add_column("")
    for name in ("back end", "arguments", "mean", "worst", "largest", "inside", "filled in one", "allowed", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        allowed = "–" if row.tolerance is None else f"{row.tolerance.measure} ≤ {row.tolerance.levels:g}"
        table.add_row(
            row.name,
            row.back_end,
            _range(row),
            *(f"{row.most(measure):.3f}" for measure in ("mean", "worst")),
            f"{row.most('largest'):.0f}",
            _cell(row.most("inside"), ".3f"),
            _cell(100 * row.most("filled_by_one"), ".2f", " %"),
            allowed,
            "" if row.tolerance is None else "holds" if row.holds else "FAILS",
        )
    return table


def _range(row: ParityRow) -> str:
    args = [difference.arg for difference in row.differences if difference.arg is not None]
    return f"{len(args)} in [{min(args):g}, {max(args):g}]" if args else ""


def _cell(value: float, form: str, unit: str = "") -> str:
    return "" if np.isnan(value) else format(value, form) + unit
