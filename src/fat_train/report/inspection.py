"""One image file read once: the hash of its bytes, and what is out of the ordinary about it."""

from __future__ import annotations

import hashlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from PIL.ImageFile import ImageFile

from fat_train.data.agreement import ORIENTATION_TAG, disagreement
from fat_train.data.index import Place
from fat_train.data.picture import reason_of

SHORT_SIDE_AT_LEAST_PX = 32
DIGEST_BYTES = 16
NO_DIGEST = bytes(DIGEST_BYTES)
"""Of a file that could not be read, or that is empty: it is no other's copy."""
JPEG_END = b"\xff\xd9"


class Kind(NamedTuple):
    """Something that can be out of the ordinary about an image."""

    title: str
    """What such files are."""
    effect: str
    """What training does with them."""


STOPPING = {
    "empty": Kind("empty files", "stop training"),
    "unreadable": Kind("no images, or damaged ones", "stop training"),
    "truncated": Kind(
        "cut off before the end of the picture",
        "stop training: with data.backend=torch at once, with dali when a crop reaches the missing part",
    ),
    "ambiguous": Kind(
        "decoded differently by DALI and PIL",
        "data.backend=torch refuses them, dali trains on another picture or stops; as RGB JPEG or PNG they would do",
    ),
}
"""With these no run gets to its end, or not to the same end with both back ends."""
SPOILING = {
    "in_val": Kind("copies of validation images", "trained on: validation accuracy would be too good"),
}
"""Training runs; its result is not what it says."""
NOTABLE = {
    "duplicate": Kind("copies of another image of their split", "used like any other"),
    "cmyk": Kind("CMYK or YCCK", "converted to RGB; DALI and PIL differ by one grey level at most"),
    "deep": Kind("16 bits a channel", "taken down to the upper 8 bits, alike in both back ends"),
    "grey": Kind("grey", "the one channel is taken three times, alike in both back ends"),
    "palette": Kind("with a colour table", "looked up, alike in both back ends"),
    "alpha": Kind("with transparency", "the transparency is left out, alike in both back ends"),
    "exif_turned": Kind("turned by their EXIF orientation", "left lying as stored, in both back ends"),
    "wrong_suffix": Kind("another format than the name says", "read by what they are, in both back ends"),
    "tiny": Kind(f"short side under {SHORT_SIDE_AT_LEAST_PX} px", "enlarged"),
    "no_end": Kind("JPEG without its end mark", "used like any other: no pixel is missing"),
}
"""Training lives with these."""
KINDS = STOPPING | SPOILING | NOTABLE
EXCLUDED = STOPPING | SPOILING
"""What a list of images to leave out names."""


class Oddity(NamedTuple):
    """One thing about one image."""

    kind: str
    """A key of `KINDS`."""
    detail: str


class Inspection(NamedTuple):
    """What reading an image has shown."""

    digest: bytes
    """The first 16 bytes of the SHA-1 of the encoded image, or `NO_DIGEST`."""
    oddities: list[Oddity]


def inspect_image(place: Place) -> Inspection:
    """Read one image, decode it to its end and say what is out of the ordinary about it.

    JPEGs are decoded at an eighth of their size: every byte is gone through just the same, in two thirds of the time,
    and a missing end is found as in the whole size.
    """
    try:
        encoded = place.read()
    except OSError as error:
        return Inspection(NO_DIGEST, [Oddity("unreadable", reason_of(error))])
    if not encoded:
        return Inspection(NO_DIGEST, [Oddity("empty", "0 bytes")])
    digest = hashlib.sha1(encoded, usedforsecurity=False).digest()[:DIGEST_BYTES]  # half again as fast as blake2b
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a colour table, of a broken EXIF block: the picture is whole
            with Image.open(io.BytesIO(encoded)) as image:
                oddities = _of_header(image, encoded, Path(place.member or place.file).suffix)
                after_header = image.fp.tell() if image.format == "JPEG" and image.fp else None
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                image.load()
                oddities += _of_orientation(image)
            if image.format == "PNG":  # DALI refuses a wrong checksum, PIL passes over that of the pixels
                with Image.open(io.BytesIO(encoded)) as image:
                    image.verify()
    except Exception as error:  # a broken file makes PIL's many readers raise nearly anything
        kind = "truncated" if _is_cut(encoded, error) else "unreadable"
        return Inspection(digest, [Oddity(kind, reason_of(error))])
    if after_header is not None and encoded.rfind(JPEG_END, after_header) < 0:
        if encoded.endswith(b"\0\0"):
            oddities.insert(0, Oddity("truncated", "its end is filled with zeros, which decode as a flat area"))
        else:
            oddities.append(Oddity("no_end", f"ends in {encoded[-2:].hex()}, not in {JPEG_END.hex()}"))
    return Inspection(digest, oddities)


def _of_header(image: ImageFile, encoded: bytes, suffix: str) -> list[Oddity]:
    oddities = []
    mode = image.mode
    different = disagreement(image, encoded)
    if different:
        oddities.append(Oddity("ambiguous", different))
    else:
        if mode == "CMYK":
            oddities.append(Oddity("cmyk", "YCCK" if image.info.get("adobe_transform") == 2 else "CMYK"))
        if _is_deep(image):
            oddities.append(Oddity("deep", f"{image.format} of mode {mode}"))
        if mode in ("1", "L", "LA"):
            oddities.append(Oddity("grey", f"mode {mode}"))
        if mode == "P":
            oddities.append(Oddity("palette", f"mode {mode}"))
        if mode in ("LA", "RGBA") or "transparency" in image.info:
            oddities.append(Oddity("alpha", f"mode {mode}"))
    if min(image.size) < SHORT_SIDE_AT_LEAST_PX:
        oddities.append(Oddity("tiny", f"{image.width} × {image.height} px"))
    actual = "JPEG" if image.format == "MPO" else image.format  # a camera's JPEG with a second picture behind it
    if Image.registered_extensions().get(suffix.lower()) != actual:
        oddities.append(Oddity("wrong_suffix", f"is {actual}"))
    return oddities


def _is_deep(image: ImageFile) -> bool:
    """Whether the file has 16 bits a channel: PIL's mode does not say so, the raw mode that it reads does."""
    args = image.tile[0].args if image.tile else ""
    if image.format == "PPM":
        return "65535" in str(args)
    return ";16" in (args if isinstance(args, str) else str(args))


def _of_orientation(image: ImageFile) -> list[Oddity]:
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # broken metadata; training does not read them
        return []
    return [] if orientation == 1 else [Oddity("exif_turned", f"orientation {orientation}")]


def _is_cut(encoded: bytes, error: Exception) -> bool:
    """Whether a file that failed is the beginning of an image, as far as its format lets one see."""
    if encoded.startswith(b"\xff\xd8"):
        return JPEG_END not in encoded[-1024:] or "truncated" in str(error).lower()
    if encoded.startswith(b"\x89PNG"):
        return b"IEND" not in encoded[-1024:]
    if encoded.startswith(b"RIFF"):
        return len(encoded) < int.from_bytes(encoded[4:8], "little") + 8
    return "truncated" in str(error).lower()
