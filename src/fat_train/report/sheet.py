"""A contact sheet: pictures in a grid, with their captions under them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

FONT = Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # has λ, × and ·, wherever we run
CAPTION_PX, HEADER_PX = 13, 18
GAP_PX = 12
TILE_AT_LEAST_PX = 160
INK, SECOND_INK, PAPER = "#111111", "#666666", "#FFFFFF"


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    captions: Sequence[str],
    out_png: Path,
    *,
    header: str = "",
    columns: int = 6,
) -> Path:
    """Write pictures with captions under them as one PNG.

    Args:
        images: RGB pictures, all of one size. Small ones are enlarged by a whole factor, so that pixels stay squares.
        captions: one a picture; a line break starts a second line, and what does not fit is cut with "…".
        out_png: the sheet's place; it is replaced.
        header: a line over all of it.
        columns: pictures beside each other, at least 1; fewer where there are fewer.

    Returns:
        `out_png`.
    """
    assert images
    assert len(images) == len(captions)
    columns = min(columns, len(images))
    height_px, width_px = images[0].shape[:2]
    zoom = max(1, -(-TILE_AT_LEAST_PX // width_px))
    width_px, height_px = width_px * zoom, height_px * zoom
    font, bold = ImageFont.truetype(FONT, CAPTION_PX), ImageFont.truetype(FONT, HEADER_PX)

    line_px = round(CAPTION_PX * 1.35)
    lines = max(caption.count("\n") + 1 for caption in captions)
    cell_px = height_px + 4 + lines * line_px + GAP_PX
    top_px = GAP_PX + (round(HEADER_PX * 1.8) if header else 0)
    rows = -(-len(images) // columns)
    size = (GAP_PX + columns * (width_px + GAP_PX), top_px + rows * cell_px)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    if header:
        pen.text((GAP_PX, GAP_PX), shorten(header, bold, size[0] - 2 * GAP_PX), fill=INK, font=bold)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        left, top = GAP_PX + column * (width_px + GAP_PX), top_px + row * cell_px
        tile = Image.fromarray(image)
        sheet.paste(tile.resize((width_px, height_px), Image.Resampling.NEAREST), (left, top))
        for line_number, line in enumerate(caption.split("\n")):
            place = (left, top + height_px + 4 + line_number * line_px)
            pen.text(place, shorten(line, font, width_px), fill=SECOND_INK if line_number else INK, font=font)
    sheet.save(out_png)
    return out_png


def shorten(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """Cut `text`, at its end and with "…", so that it is at most `width_px` wide in `font`."""
    if font.getlength(text) <= width_px:
        return text
    kept = next((n for n in range(len(text) - 1, 0, -1) if font.getlength(text[:n].rstrip() + "…") <= width_px), 0)
    return text[:kept].rstrip() + "…"
