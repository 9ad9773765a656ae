"""The picture of the comparison: photograph, reference, back end, and their difference made visible."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from fat_train.augment.draws import Draws, draw, operation_argument
from fat_train.augment.policy import AugmentConfig, Op
from fat_train.data.index import Place
from fat_train.data.picture import PictureSpec, make_pictures
from fat_train.report.parity import SEED, Lowering, arguments, draws_of_one, name_of, stack
from fat_train.report.sheet import CAPTION_PX, FONT, GAP_PX, HEADER_PX, INK, PAPER, SECOND_INK, shorten

AMPLIFIED = 16
SHOWN_LEVEL = 9.0
RECIPES_SHOWN = 8
TILE_PX, SEAM_PX, BLOCK_GAP_PX, BLOCKS = 224, 3, 28, 2
HEADS = ("photograph", "PIL and timm", "DALI", f"difference × {AMPLIFIED}")


class Strip(NamedTuple):
    """One line of the sheet: the same photograph four times."""

    title: str
    tiles: tuple[UInt8[np.ndarray, "H W 3"], ...]
    """In the order of `HEADS`."""
    note: str


def operation_strips(
    squares: Sequence[Place], spec: PictureSpec, config: AugmentConfig, lowering: Lowering
) -> list[Strip]:
    """Every operation at the recipe's strength, each on a photograph of its own."""
    places = [squares[number % len(squares)] for number in range(len(Op))]
    args = [_shown_argument(op) for op in Op]
    draws = stack([draws_of_one(op, arg, 1, config, spec.image_px) for op, arg in zip(Op, args, strict=True)])
    titles = [
        f"{name_of(op)} {arg:.3g}" if len(arguments(op)) > 1 else name_of(op) for op, arg in zip(Op, args, strict=True)
    ]
    return _strips(titles, places, draws, spec, lowering)


def recipe_strips(places: Sequence[Place], spec: PictureSpec, config: AugmentConfig, lowering: Lowering) -> list[Strip]:
    """Whole pictures of training, from file to network."""
    places = places[:RECIPES_SHOWN]
    draws = draw(config, spec.image_px, np.random.default_rng(SEED), len(places))
    titles = [", then ".join(name_of(Op(op)) for op in row if op >= 0) or "crop and flip alone" for row in draws.op]
    return _strips(titles, places, draws, spec, lowering)


def _shown_argument(op: Op) -> float:
    if op == Op.GAUSSIAN_BLUR:
        return arguments(op)[-1]
    wanted = float(operation_argument(np.array(op), np.array(SHOWN_LEVEL), np.array(1.0), increasing=True))
    return min(arguments(op), key=lambda arg: abs(arg - wanted))


def _strips(
    titles: Sequence[str], places: Sequence[Place], draws: Draws, spec: PictureSpec, lowering: Lowering
) -> list[Strip]:
    strips = []
    before, theirs, ours = (
        make_pictures(places, None, spec),
        make_pictures(places, draws, spec),
        lowering(places, draws, spec),
    )
    for title, *pictures in zip(titles, before, theirs, ours, strict=True):
        apart = np.abs(pictures[1].astype(int) - pictures[2])
        amplified = np.minimum(255, AMPLIFIED * apart).astype(np.uint8)
        note = f"mean {apart.mean():.2f}, largest {apart.max()}"
        strips.append(Strip(title, (*pictures, amplified), note))
    return strips


def parity_sheet(sections: Sequence[tuple[str, Sequence[Strip]]], out_png: Path) -> Path:
    """Write the strips of each section, under its heading, as one PNG.

    Args:
        sections: heading and strips.
        out_png: the sheet's place; it is replaced.

    Returns:
        `out_png`.
    """
    font, bold = ImageFont.truetype(FONT, CAPTION_PX), ImageFont.truetype(FONT, HEADER_PX)
    line_px = round(CAPTION_PX * 1.5)
    heading_px, strip_px = round(HEADER_PX * 1.8) + line_px, line_px + TILE_PX + GAP_PX
    block_px = len(HEADS) * (TILE_PX + SEAM_PX) - SEAM_PX
    rows = [-(-len(strips) // BLOCKS) for _, strips in sections]
    width_px = 2 * GAP_PX + BLOCKS * (block_px + BLOCK_GAP_PX) - BLOCK_GAP_PX
    sheet = Image.new("RGB", (width_px, 2 * GAP_PX + len(rows) * heading_px + sum(rows) * strip_px), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = GAP_PX
    for (heading, strips), row_count in zip(sections, rows, strict=True):
        pen.text((GAP_PX, top), shorten(heading, bold, width_px - 2 * GAP_PX), fill=INK, font=bold)
        for number, strip in enumerate(strips):
            row, block = divmod(number, BLOCKS)
            left, line = GAP_PX + block * (block_px + BLOCK_GAP_PX), top + heading_px + row * strip_px
            if row == 0:
                for column, head in enumerate(HEADS):
                    place = (left + column * (TILE_PX + SEAM_PX), line - line_px)
                    pen.text(place, head, fill=SECOND_INK, font=font)
            pen.text((left, line), shorten(strip.title, font, 0.7 * block_px), fill=INK, font=font)
            pen.text((left + block_px, line), strip.note, fill=SECOND_INK, font=font, anchor="ra")
            for column, tile in enumerate(strip.tiles):
                sheet.paste(_to_size(tile), (left + column * (TILE_PX + SEAM_PX), line + line_px))
        top += heading_px + row_count * strip_px
    sheet.save(out_png)
    return out_png


def _to_size(tile: UInt8[np.ndarray, "H W 3"]) -> Image.Image:
    """Bring a picture to the tile's size: pixels stay squares where it is smaller."""
    kernel = Image.Resampling.NEAREST if len(tile) <= TILE_PX else Image.Resampling.BOX
    return Image.fromarray(tile).resize((TILE_PX, TILE_PX), kernel)
