"""Which image files DALI and PIL decode to the same picture: the two back ends must not train on different ones.

What is said here was measured on photographs saved in each form, and `tests/data/test_agreement.py` measures it again.
"""

from __future__ import annotations

from PIL.ImageFile import ImageFile

ALIKE = {
    "JPEG": {"L", "RGB", "CMYK"},
    "MPO": {"L", "RGB"},
    "PNG": {"1", "L", "LA", "P", "RGB", "RGBA"},
    "BMP": {"1", "L", "P", "RGB"},
    "WEBP": {"RGB", "RGBA"},
    "TIFF": {"L", "P", "RGB", "RGBA", "CMYK", "YCbCr"},
    "PPM": {"1", "L", "RGB"},
    "JPEG2000": {"L", "RGB", "RGBA"},
}
"""PIL's modes of each format whose pictures differ by less than one grey level on average, and by one at most."""
ORIENTATION_TAG = 0x0112
"""EXIF's number of the orientation; 1 is upright."""
PPM_LEVELS = (255, 65535)


def disagreement(image: ImageFile, encoded: bytes) -> str | None:
    """Say why DALI and PIL's `convert("RGB")` would make different pictures of a file, or None where they do not.

    Args:
        image: the file, opened and not yet loaded.
        encoded: its bytes.
    """
    modes = ALIKE.get(image.format or "")
    if modes is None:
        return f"{image.format} is a format that DALI does not decode"
    if image.mode.startswith("I"):
        return f"16 bits of grey (mode {image.mode}): DALI scales them to 8, PIL cuts off what is over 255"
    if image.mode not in modes:
        return f"{image.format} of mode {image.mode}: DALI and PIL make different pictures of it"
    return _peculiarity(image, encoded)


def _peculiarity(image: ImageFile, encoded: bytes) -> str | None:
    kind = image.format
    if kind == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        return "CMYK without Adobe's mark: of DALI's picture and PIL's one is the other's negative"
    if kind == "TIFF" and image.getexif().get(ORIENTATION_TAG, 1) != 1:
        return "a TIFF that lies turned: PIL turns it upright, DALI does not"
    if kind == "PPM" and _ppm_levels(image) not in PPM_LEVELS:
        return f"a PPM whose white is not {PPM_LEVELS[0]}, or that is written as text: PIL scales it, DALI does not"
    if kind == "WEBP" and _padded_lossless(encoded):
        return "a lossless WebP of odd length with metadata behind it: DALI's parser stops at it"
    return None


def _ppm_levels(image: ImageFile) -> int:
    """The file's white; 255 for the raw ones that PIL takes as they are, 0 for text."""
    decoder, _, _, args = image.tile[0]
    if decoder == "raw":
        return PPM_LEVELS[0]
    return int(args[1]) if decoder == "ppm" and isinstance(args, tuple) else 0


def _padded_lossless(encoded: bytes) -> bool:
    at = encoded.find(b"VP8L", 12)
    size = int.from_bytes(encoded[at + 4 : at + 8], "little")
    return at >= 0 and size % 2 == 1 and at + 8 + size + 1 < len(encoded)
