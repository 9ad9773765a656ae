"""Each kind of oddity, planted in a picture and found."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fat_train.data.index import Place
from fat_train.report.inspection import KINDS, NO_DIGEST, inspect_image

TURNED = Image.Exif()
TURNED[0x0112] = 6


def picture(mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> Image.Image:
    row, column = np.mgrid[: size[1], : size[0]]
    noise = np.random.default_rng(0).integers(0, 60, (size[1], size[0], 3))
    levels = np.dstack([row * 3, column * 2, 150 - row]) + noise
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert(mode)


def saved(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def deep() -> bytes:
    return b"P6\n64 48\n65535\n" + (np.array(picture()).astype(np.uint16) * 257).astype(">u2").tobytes()


def zero_filled() -> bytes:
    """A JPEG whose tail was never written: short enough for the zeros to decode as its last blocks."""
    whole = saved(picture(size=(256, 256)), quality=90)
    for missing in range(20, 2000, 10):
        encoded = whole[:-missing] + bytes(missing * 4)
        with Image.open(io.BytesIO(encoded)) as image:
            try:
                image.load()
            except OSError:
                continue
            return encoded
    raise AssertionError("no tail of zeros decoded")


LARGE = picture(size=(256, 256))
PLANTED: dict[str, tuple[set[str], Callable[[], bytes]]] = {
    "sound.JPEG": (set(), lambda: saved(picture())),
    "sound.png": (set(), lambda: saved(picture(), "PNG")),
    "trailing.JPEG": (set(), lambda: saved(picture()) + b"junk behind the picture"),
    "camera.JPEG": (set(), lambda: saved(picture(), "MPO", save_all=True, append_images=[picture()])),
    "empty.JPEG": ({"empty"}, lambda: b""),
    "text.JPEG": ({"unreadable"}, lambda: b"no picture at all"),
    "head.JPEG": ({"unreadable"}, lambda: b"\0\0" + saved(picture())[2:]),
    "half.JPEG": ({"truncated"}, lambda: saved(LARGE)[: len(saved(LARGE)) // 2]),
    "end.JPEG": ({"truncated"}, lambda: saved(LARGE, quality=95)[:-12]),
    "progressive.JPEG": ({"truncated"}, lambda: saved(LARGE, quality=95, progressive=True)[:-12]),
    "start.JPEG": ({"truncated"}, lambda: saved(LARGE)[:300]),
    "half.png": ({"truncated"}, lambda: saved(LARGE, "PNG")[:9000]),
    "half.webp": ({"truncated"}, lambda: saved(LARGE, "WEBP")[:3000]),
    "half.bmp": ({"truncated"}, lambda: saved(LARGE, "BMP")[:9000]),
    "zeros.JPEG": ({"truncated"}, zero_filled),
    "flipped.png": ({"unreadable"}, lambda: (b := saved(LARGE, "PNG"))[:9000] + bytes(30) + b[9030:]),
    "grey16.png": ({"ambiguous"}, lambda: saved(Image.fromarray(np.full((64, 64), 999, np.uint16)), "PNG")),
    "gif.JPEG": ({"ambiguous", "wrong_suffix"}, lambda: saved(picture(), "GIF")),
    "cmyk.JPEG": ({"cmyk"}, lambda: saved(picture("CMYK"))),
    "deep.ppm": ({"deep"}, deep),
    "grey.JPEG": ({"grey"}, lambda: saved(picture("L"))),
    "palette.png": ({"palette"}, lambda: saved(picture("P"), "PNG")),
    "alpha.png": ({"alpha"}, lambda: saved(picture("RGBA"), "PNG")),
    "clear.png": ({"palette", "alpha"}, lambda: saved(picture("P"), "PNG", transparency=3)),
    "turned.JPEG": ({"exif_turned"}, lambda: saved(picture(), exif=TURNED)),
    "bad_exif.JPEG": (set(), lambda: saved(picture(), exif=b"Exif\0\0no metadata at all")),
    "png.JPEG": ({"wrong_suffix"}, lambda: saved(picture(), "PNG")),
    "tiny.JPEG": ({"tiny"}, lambda: saved(picture(size=(300, 31)))),
    "all.png": ({"grey", "exif_turned", "tiny", "wrong_suffix"}, lambda: saved(picture("L", (20, 20)), exif=TURNED)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_each_kind_is_found_and_nothing_else(name: str, tmp_path: Path) -> None:
    kinds, make = PLANTED[name]
    path = tmp_path / name
    path.write_bytes(make())
    found = inspect_image(Place(str(path)))
    assert {oddity.kind for oddity in found.oddities} == kinds
    assert (found.digest == NO_DIGEST) == (name == "empty.JPEG")


def test_every_kind_but_copies_is_planted() -> None:
    planted = set().union(*(kinds for kinds, _ in PLANTED.values()))
    assert planted == KINDS.keys() - {"in_val", "duplicate", "no_end"}


def test_photographs_cut_anywhere_are_truncated_or_whole(imagenet_samples: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.JPEG"
    for photograph in sorted(imagenet_samples.glob("*/*"))[::20]:
        whole = photograph.read_bytes()
        for missing in (2, 3, 10, 400, len(whole) // 2, len(whole) - 200):
            path.write_bytes(whole[:-missing])
            (kind,) = {oddity.kind for oddity in inspect_image(Place(str(path))).oddities} - {"grey", "tiny"}
            assert kind == "truncated" or (kind == "no_end" and missing == 2)


def test_an_archives_member_is_named_and_read_as_a_file_is(tmp_path: Path) -> None:
    archive = tmp_path / "images.tar"
    encoded = saved(picture(), "PNG")
    archive.write_bytes(b"before" + encoded + b"behind")
    sound = inspect_image(Place(str(archive), 6, len(encoded), "cat/sound.png"))
    (cut,) = inspect_image(Place(str(archive), 6, len(encoded) - 30, "cat/sound.png")).oddities
    (missing,) = inspect_image(Place(str(archive), 6, len(encoded) + 30, "cat/sound.png")).oddities
    assert sound.oddities == []
    assert (cut.kind, missing.kind) == ("truncated", "unreadable")


def test_a_link_to_nowhere_is_unreadable(tmp_path: Path) -> None:
    link = tmp_path / "gone.JPEG"
    link.symlink_to(tmp_path / "nowhere")
    found = inspect_image(Place(str(link)))
    assert found.digest == NO_DIGEST
    assert found.oddities == [("unreadable", "the file is not there any more")]
