"""Decoding of every kind of file that people have, and the training transform against torchvision's."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import time
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from clipq.data import decode
from clipq.data.decode import MAX_PIXELS, decode_pil, decode_rgb
from clipq.data.shards import read_shard
from tests.helpers import encode, real_data

HEIGHT, WIDTH = 24, 36


def smooth() -> np.ndarray:
    """A picture without a symmetry and with little to lose in JPEG: [24, 36, 3] uint8."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([40 + 5 * x, 20 + 8 * y, 200 - 2 * x - 3 * y], -1).astype(np.uint8)


def difference(a: np.ndarray | Image.Image, b: np.ndarray | Image.Image) -> int:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return int(np.abs(a.astype(int) - b).max())


def both(data: bytes) -> np.ndarray:
    """What both decoders make of the bytes, after a check that they agree."""
    rgb = decode_rgb(data)
    assert rgb.dtype == np.uint8
    assert rgb.ndim == 3
    assert rgb.shape[2] == 3
    assert difference(rgb, decode_pil(data)) <= 4
    return rgb


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 12),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
        ("JPEG", {"quality": 95, "subsampling": 2}, 14),
        ("BMP", {}, 0),
        ("GIF", {}, 40),
        ("TIFF", {}, 0),
    ],
)
def test_formats(kind: str, options: dict, tolerance: int) -> None:
    assert difference(both(encode(Image.fromarray(smooth()), kind, **options)), smooth()) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_greyscale_has_three_equal_channels(kind: str) -> None:
    grey = Image.fromarray(smooth()).convert("L")
    rgb = both(encode(grey, kind, quality=95))
    assert (np.ptp(rgb, axis=2) <= 3).all()
    assert difference(rgb[..., 1], grey) <= 6


def test_one_bit() -> None:
    black_and_white = Image.fromarray(smooth()).convert("1")
    assert difference(both(encode(black_and_white)), black_and_white.convert("RGB")) == 0


@pytest.mark.parametrize("marked", [True, False])
def test_cmyk(marked: bool) -> None:
    """Everyone stores CMYK inverted, as Photoshop does, with its Adobe marker or without."""
    ink = 255 - np.concatenate([smooth(), np.full((HEIGHT, WIDTH, 1), 255, np.uint8)], 2)  # C, M, Y = 255 - RGB; K = 0
    data = encode(Image.fromarray(ink, mode="CMYK"), "JPEG", quality=97, subsampling=0)
    marker = data.index(b"\xff\xee\x00\x0eAdobe")
    if not marked:
        data = data[:marker] + data[marker + 16 :]
    assert difference(both(data), smooth()) <= 6


def test_palette() -> None:
    colours = Image.fromarray(smooth()).quantize(16)
    assert difference(both(encode(colours)), colours.convert("RGB")) == 0


@pytest.mark.parametrize("transparency", [0, bytes([0, 128, 255, 255])])
@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_transparent_palette_is_put_on_white(kind: str, transparency: int | bytes) -> None:
    if kind == "GIF" and isinstance(transparency, bytes):
        pytest.skip("GIF has one transparent entry")
    image = Image.fromarray(np.arange(4, dtype=np.uint8).repeat(8).reshape(4, 8), mode="P")
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 10, 20, 30])
    rgb = both(encode(image, kind, transparency=transparency))
    assert rgb[0, 0].tolist() == [255, 255, 255]  # not the red below
    if isinstance(transparency, bytes):
        assert np.abs(rgb[1, 0].astype(int) - [127, 227, 127]).max() <= 1
    else:
        assert rgb[1, 0].tolist() == [0, 200, 0]
    assert rgb[3, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_put_on_white(mode: str, kind: str) -> None:
    if (mode, kind) == ("LA", "WEBP"):
        pytest.skip("WebP has no LA")
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(smooth())
    image.putalpha(Image.fromarray(alpha))
    image = image.convert(mode)
    opaque = np.asarray(image.convert("RGBA").convert("RGB")).astype(float)
    share = alpha[..., None] / 255
    expected = (opaque * share + 255 * (1 - share)).round().astype(np.uint8)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    assert difference(both(encode(image, kind, **options)), expected) <= 1


@pytest.mark.parametrize("key", [None, 5])
@pytest.mark.parametrize("top", [255, 30_000, 65_535])
def test_16_bit_png_is_as_bright_as_its_upper_eight_bits(top: int, key: int | None) -> None:
    """Neither clipped nor stretched: a dark picture stays dark. `key` is a transparent grey value."""
    values = np.linspace(0, top, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    options = {} if key is None else {"transparency": key}
    rgb = both(encode(Image.fromarray(values), **options))
    assert difference(rgb[..., 0], (values >> 8).astype(np.uint8)) <= 1


def test_16_bit_rgb_png() -> None:
    """Pillow does not write one, so this does."""
    wide = (smooth() * np.uint16(256) + np.uint16(77)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert difference(both(data), smooth()) == 0


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_of_unknown_range_do_not_wrap(dtype: type) -> None:
    values = np.linspace(-1000, 100_000, HEIGHT * WIDTH).astype(dtype).reshape(HEIGHT, WIDTH)
    rgb = both(encode(Image.fromarray(values), "TIFF"))
    assert (np.diff(rgb[..., 0].ravel().astype(int)) >= 0).all()
    assert (rgb.min(), rgb.max()) == (0, 255)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "a camera"
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels of a file that EXIF `orientation` turns into `upright`, from the words of the EXIF specification."""
    # where the specification says that the stored 0th row and 0th column lie in the upright picture
    return {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.swapaxes(0, 1),  # left, top
        6: upright[:, ::-1].swapaxes(0, 1),  # right, top
        7: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
        8: upright[::-1].swapaxes(0, 1),  # left, bottom
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(kind: str, orientation: int) -> None:
    image = Image.fromarray(np.ascontiguousarray(stored(smooth(), orientation)))
    options = {"JPEG": {"quality": 97, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    assert difference(both(encode(image, kind, exif=exif_of(orientation), **options)), smooth()) <= 6


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.fixture
def turned() -> bytes:
    """A JPEG without EXIF of the picture turned a quarter: orientation 6 makes it upright."""
    return encode(Image.fromarray(np.ascontiguousarray(stored(smooth(), 6))), "JPEG", quality=97, subsampling=0)


@pytest.mark.parametrize(
    "before",
    [
        b"",
        segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(20_000)),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xda\xff\xc0" * 100),  # what looks like a scan inside of a profile
        segment(0xFE, b"x" * 65_000) * 2,
    ],
    ids=["first", "behind a profile", "behind false markers", "behind comments"],
)
def test_orientation_far_into_the_file(turned: bytes, before: bytes) -> None:
    data = turned[:2] + before + segment(0xE1, b"Exif\0\0" + exif_of(6).removeprefix(b"Exif\0\0")) + turned[2:]
    assert difference(both(data), smooth()) <= 6


def test_orientation_in_xmp(turned: bytes) -> None:
    packet = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    assert difference(both(turned[:2] + segment(0xE1, packet) + turned[2:]), smooth()) <= 6


def test_plain_jpeg_takes_the_fast_path(turned: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_pil", lambda data: pytest.fail("Pillow was asked"))
    upright = turned[:2] + segment(0xE1, b"Exif\0\0" + exif_of(1).removeprefix(b"Exif\0\0")) + turned[2:]
    for data in (turned, upright, turned + b"Exif\0\0 Orientation"):
        assert decode_rgb(data).shape == (WIDTH, HEIGHT, 3)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of corrupt EXIF
@pytest.mark.parametrize(
    "block",
    [b"", b"garbage", b"II*\0", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x05\0\0\0\x01"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_picture(kind: str, block: bytes) -> None:
    data = encode(Image.fromarray(smooth()), kind, exif=b"Exif\0\0" + block, quality=90)
    assert difference(both(data), smooth()) < 40


GOOD = {kind: encode(Image.fromarray(smooth()), kind) for kind in ("JPEG", "PNG", "WEBP")}


@pytest.mark.parametrize("decoder", [decode_pil, decode_rgb])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not an image"),
        (b"<html>404 Not Found</html>", "<html>404"),
        (b"\xff\xd8", "image"),
        (b"\xff\xd8\xff\xe1\xff\xff", "image"),
        (b"\xff\xd8\xff\xd9", "image"),
        (b"\xff\xd8" + b"\xff\xe0\0\0" * 10, "image"),
        (GOOD["JPEG"][:-60], "truncated"),
        (GOOD["JPEG"][:200], "image"),
        (GOOD["PNG"][:-40], "truncated|broken|image"),
        (GOOD["PNG"][:60], "image"),
        (GOOD["WEBP"][:-40], "image"),
        (encode(Image.fromarray(smooth()), "EPS"), "EPS"),
    ],
)
def test_what_is_no_image(decoder: object, data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decoder(data)  # pyright: ignore


def test_any_damage_is_a_value_error() -> None:
    """A worker that dies of another error ends the run."""
    rng = random.Random(0)
    for kind in GOOD:
        for _ in range(60):
            damaged = bytearray(GOOD[kind])
            for _ in range(rng.randrange(1, 5)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            for decoder in (decode_pil, decode_rgb):
                with contextlib.suppress(ValueError):
                    decoder(bytes(damaged))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decoder", [decode_pil, decode_rgb])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_before_they_are_unpacked(kind: str, decoder: object) -> None:
    small = encode(Image.new("L", (64, 64)), kind)
    # The size stands in the header: neither decoder may believe it.
    if kind == "JPEG":
        at = small.index(b"\xff\xc0") + 5
        bomb = small[:at] + struct.pack(">HH", 10_000, 13_000) + small[at + 4 :]
    else:
        header = b"IHDR" + struct.pack(">II", 13_000, 10_000) + small[24:29]
        bomb = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=f"13000 x 10000 pixels are more than the {MAX_PIXELS:,}"):
        decoder(bomb)  # pyright: ignore
    assert time.perf_counter() - start < 0.5
    if kind == "JPEG":
        with pytest.raises(ValueError, match="pixels"):  # Pillow itself stops at twice the size
            decoder(bomb.replace(struct.pack(">H", 13_000), b"\xff\xf0"))  # pyright: ignore


@pytest.mark.parametrize("folder", ["tiny_imagenet/train", "flickr8k/dev"])
def test_photographs_decode_as_with_pillow(folder: str) -> None:
    shard = sorted(real_data(*folder.split("/")).glob("*.tar.gz"))[0]
    for _, sample in zip(range(150), read_shard(str(shard)), strict=False):
        expected = np.asarray(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
        rgb = decode_rgb(sample["jpg"])
        assert difference(rgb, expected) <= 3
        assert difference(decode_pil(sample["jpg"]), expected) == 0


def test_references_of_this_file() -> None:
    """The EXIF table above agrees with Pillow's, and the JPEG library still says no to what it says no to."""
    for orientation in range(1, 9):
        image = Image.fromarray(np.ascontiguousarray(stored(smooth(), orientation)))
        image.getexif()[ExifTags.Base.Orientation] = orientation
        assert difference(ImageOps.exif_transpose(image), smooth()) == 0
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(GOOD["JPEG"][:-60])
