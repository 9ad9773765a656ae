"""What is said of each form of file is what DALI and PIL do: measured, on the same picture saved in every form."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fat_train.data.agreement import disagreement
from fat_train.data.index import Place
from fat_train.data.picture import read_rgb
from fat_train.types import UserError

pytest.importorskip("nvidia.dali", reason="DALI is not installed")

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.data_node import DataNode


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, kind, exif=exif, **options)


def cmyk(image: Image.Image) -> Image.Image:
    """With as much black as there is."""
    levels = 255 - np.array(image).astype(float)
    black = 0.8 * levels.min(axis=-1, keepdims=True)
    inks = (levels - black) / (255 - black) * 255
    return Image.fromarray(np.concatenate([inks, black], -1).round().astype(np.uint8), "CMYK")


def ycck(image: Image.Image) -> bytes:
    inks = np.array(cmyk(image))
    planes = np.dstack([np.array(Image.fromarray(inks[..., :3]).convert("YCbCr")), 255 - inks[..., 3]])
    encoded = bytearray(saved(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=95))
    encoded[encoded.index(b"Adobe") + 11] = 2  # the mark's transform: YCCK
    return bytes(encoded)


def without_adobes_mark(image: Image.Image) -> bytes:
    encoded = saved(cmyk(image), "JPEG", quality=95)
    at = encoded.index(b"\xff\xee")
    return encoded[:at] + encoded[at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big") :]


def deep_png(image: Image.Image) -> bytes:
    levels = (np.array(image).astype(np.uint16) * 257).astype(">u2")
    header = struct.pack(">IIBBBBB", image.width, image.height, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in levels))
    chunks = ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def grey_of_16_bits(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)


def with_alpha(image: Image.Image, mode: str = "RGBA") -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image.convert(mode)


def ppm(image: Image.Image, white: int) -> bytes:
    levels = np.array(image).astype(float) * white / 255
    head = b"P6\n%d %d\n%d\n" % (*image.size, white)
    return head + levels.round().astype(">u2" if white > 255 else np.uint8).tobytes()


def odd_lossless_webp(image: Image.Image, parity: int) -> bytes:
    for width in range(image.width, 8, -1):
        plain = saved(image.crop((0, 0, width, image.height)), "WEBP", lossless=True)
        if int.from_bytes(plain[16:20], "little") % 2 == parity:
            return turned(image.crop((0, 0, width, image.height)), "WEBP", lossless=True)
    raise AssertionError("no width gave that parity")


ALIKE: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg": lambda image: saved(image, "JPEG", quality=90),
    "jpeg_progressive": lambda image: saved(image, "JPEG", quality=90, progressive=True),
    "jpeg_grey": lambda image: saved(image.convert("L"), "JPEG"),
    "jpeg_cmyk": lambda image: saved(cmyk(image), "JPEG", quality=95),
    "jpeg_ycck": ycck,
    "jpeg_turned": lambda image: turned(image, "JPEG"),
    "png": lambda image: saved(image, "PNG"),
    "png_grey": lambda image: saved(image.convert("L"), "PNG"),
    "png_grey_alpha": lambda image: saved(with_alpha(image, "LA"), "PNG"),
    "png_alpha": lambda image: saved(with_alpha(image), "PNG"),
    "png_palette": lambda image: saved(image.quantize(200), "PNG"),
    "png_palette_alpha": lambda image: saved(image.quantize(200), "PNG", transparency=bytes([0, 128])),
    "png_bits": lambda image: saved(image.convert("1"), "PNG"),
    "png_turned": lambda image: turned(image, "PNG"),
    "png_rgb_16_bits": deep_png,
    "bmp": lambda image: saved(image, "BMP"),
    "bmp_palette": lambda image: saved(image.quantize(200), "BMP"),
    "webp": lambda image: saved(image, "WEBP", quality=90),
    "webp_alpha": lambda image: saved(with_alpha(image), "WEBP", lossless=True),
    "webp_turned": lambda image: turned(image, "WEBP", quality=90),
    "webp_lossless_even": lambda image: odd_lossless_webp(image, parity=0),
    "tiff": lambda image: saved(image, "TIFF", compression="tiff_lzw"),
    "tiff_alpha": lambda image: saved(with_alpha(image), "TIFF"),
    "tiff_cmyk": lambda image: saved(cmyk(image), "TIFF"),
    "tiff_palette": lambda image: saved(image.quantize(200), "TIFF"),
    "ppm": lambda image: ppm(image, 255),
    "ppm_16_bits": lambda image: ppm(image, 65535),
}
DIFFERENT: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg_cmyk_unmarked": without_adobes_mark,
    "png_grey_16_bits": lambda image: saved(grey_of_16_bits(image), "PNG"),
    "tiff_grey_16_bits": lambda image: saved(grey_of_16_bits(image), "TIFF"),
    "tiff_float": lambda image: saved(image.convert("F"), "TIFF"),
    "tiff_bits": lambda image: saved(image.convert("1"), "TIFF"),
    "tiff_grey_alpha": lambda image: saved(with_alpha(image, "LA"), "TIFF"),
    "tiff_turned": lambda image: turned(image, "TIFF"),
    "ppm_of_100_levels": lambda image: ppm(image, 100),
    "gif": lambda image: saved(image, "GIF"),
    "webp_lossless_odd": lambda image: odd_lossless_webp(image, parity=1),
}


@pytest.fixture(scope="module", params=["made", "real"])
def photograph(request: pytest.FixtureRequest) -> Image.Image:
    if request.param == "real":
        image = Image.open(sorted(request.getfixturevalue("imagenet_samples").glob("*/*"))[2]).convert("RGB")
        return image.crop((0, 0, 301, 203))
    row, column = np.mgrid[:120, :161]
    noise = np.random.default_rng(0).integers(0, 40, (120, 161, 3))
    levels = np.dstack([row, column, 200 - row]) + noise
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


@pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=True, prefetch_queue_depth=1)
def _decode() -> DataNode:
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
    return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)


def by_dali(encoded: bytes) -> np.ndarray | None:
    pipeline = _decode()
    pipeline.build()
    pipeline.feed_input("encoded", [np.frombuffer(encoded, np.uint8)])
    try:
        pipeline.schedule_run()
        (outputs,) = pipeline.share_outputs()
    except RuntimeError:
        return None
    return np.asarray(outputs.as_tensor())[0].astype(int)


def reason(encoded: bytes) -> str | None:
    with Image.open(io.BytesIO(encoded)) as image:
        return disagreement(image, encoded)


@pytest.mark.parametrize("form", ALIKE)
def test_forms_that_pass_give_both_back_ends_one_picture(form: str, photograph: Image.Image, tmp_path: Path) -> None:
    encoded = ALIKE[form](photograph)
    assert reason(encoded) is None
    path = tmp_path / "picture.img"
    path.write_bytes(encoded)
    ours, theirs = by_dali(encoded), np.array(read_rgb(Place(str(path)))).astype(int)
    assert ours is not None
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - theirs).mean() < 1


@pytest.mark.parametrize("form", DIFFERENT)
def test_forms_that_are_named_give_two_pictures_or_none(form: str, photograph: Image.Image, tmp_path: Path) -> None:
    encoded = DIFFERENT[form](photograph)
    assert reason(encoded)
    ours, theirs = by_dali(encoded), np.array(Image.open(io.BytesIO(encoded)).convert("RGB")).astype(int)
    assert ours is None or ours.shape != theirs.shape or np.abs(ours - theirs).mean() > 1
    path = tmp_path / "picture.img"
    path.write_bytes(encoded)
    with pytest.raises(UserError, match=r"picture\.img"):
        read_rgb(Place(str(path)))
