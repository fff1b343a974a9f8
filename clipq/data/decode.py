"""From the bytes of a sample to an image and a caption.

Training takes the quick way (libjpeg-turbo, uint8, no PIL where the file allows it); evaluation takes OpenCLIP's own
PIL transform, so that its numbers are those of the field's tools.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from clipq.data.shards import Sample, member

MAX_PIXELS = 1024**3 // 12
"""Larger images are refused: a file of a few kB can unpack to gigabytes. Pillow warns from this size on."""


def decode_pil(data: bytes) -> Image.Image:
    """Encoded image -> RGB PIL image, turned upright by its EXIF orientation; transparency on white.

    Raises:
        ValueError: not an image that Pillow can read, or one of more than `MAX_PIXELS`.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS:,} accepted")
        if image.format == "EPS":
            raise ValueError("EPS is a program, which Pillow would run, and no image")
        image.load()
        _turn_upright(image)
        return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image of a known format ({len(data)} bytes, at first {data[:12]!r})") from error
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise ValueError(f"cannot decode the image ({len(data)} bytes): {error}") from error


def _turn_upright(image: Image.Image) -> None:
    # A damaged EXIF block, which raises errors of many kinds, says nothing about the picture.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 16 bits a pixel, the upper eight of which make the picture; convert() would clip at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        # Their range is not known: values outside of 0 to 255 are brought into it.
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
        low, high = min(0.0, grey.min()), max(255.0, grey.max())
        return Image.fromarray(((grey - low) / (high - low) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "LA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_rgb(data: bytes) -> np.ndarray:
    """Encoded image -> RGB array [height, width, 3], uint8, as `decode_pil` but faster on most JPEG files.

    Raises:
        ValueError: as `decode_pil`.
    """
    return _decode(data, quick=quick_size(data) is not None)


def quick_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of an upright JPEG of no more than `MAX_PIXELS`, as its header says; None for anything else."""
    if not _is_upright_jpeg(data):
        return None
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = int(height), int(width)
    return (height, width) if height * width <= MAX_PIXELS else None


def stored_size(data: bytes) -> tuple[int, int] | None:
    """Height and width as the header has them, before EXIF turns the image; None where it cannot be read."""
    try:
        if data[:2] == b"\xff\xd8":
            height, width, *_ = simplejpeg.decode_jpeg_header(data)  # a tenth of the time that Pillow takes
            return int(height), int(width)
        image = Image.open(io.BytesIO(data))
        return image.height, image.width
    except Exception:  # Pillow's readers raise errors of many kinds on damaged files
        return None


def _decode(data: bytes, *, quick: bool, least: tuple[int, int] = (0, 0)) -> np.ndarray:
    """As `decode_rgb`; where `quick`, perhaps at a smaller scale, but of no less than `least` height and width."""
    if quick:
        with contextlib.suppress(ValueError):  # Pillow reads some that libjpeg-turbo warns of, and knows what is wrong
            return simplejpeg.decode_jpeg(data, "RGB", min_height=least[0], min_width=least[1])
    return np.asarray(decode_pil(data))


def _is_upright_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG that EXIF or XMP does not ask to turn, as far as the segments before the picture say."""
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while data[at : at + 1] == b"\xff" and at + 4 <= len(data):
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker == 0xDA:  # start of scan: what follows is the picture
            return True
        if marker == 0xE1 and _may_turn(data[at + 4 : end]):
            return False
        at = end
    return False


def _may_turn(segment: bytes) -> bool:
    if segment.startswith(b"Exif\0\0"):
        try:
            exif = Image.Exif()
            exif.load(segment)
            return exif.get(ExifTags.Base.Orientation, 1) != 1
        except Exception:  # damaged: Pillow decides
            return True
    return b"Orientation" in segment


@dataclass(frozen=True)
class TrainTransform:
    """OpenCLIP's training augmentation on uint8: a random crop resized to the input size, then flip and colours."""

    size: tuple[int, int]
    """Height and width of the result."""
    interpolation: str = "bicubic"
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    color_jitter: tuple[float, ...] = ()
    color_jitter_prob: float = 0.8
    grayscale: float = 0.0

    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        """Encoded image -> [3, height, width] uint8.

        A JPEG whose crop is four times as large as the result, or more, is decoded at half its size or less.
        """
        size = quick_size(data)
        if size is None:
            rgb = _decode(data, quick=False)
            top, left, height, width = self._crop(rgb.shape[0], rgb.shape[1], rng)
        else:
            box = self._crop(*size, rng)
            # twice the result, so that what libjpeg's coarse filter leaves is smoothed by the resizing
            scale = 2 * max(self.size[0] / box[2], self.size[1] / box[3])
            least = (math.ceil(size[0] * scale), math.ceil(size[1] * scale)) if scale <= 0.5 else (0, 0)
            rgb = _decode(data, quick=True, least=least)
            top, left, height, width = _scaled(box, size, rgb.shape)
        image = torch.from_numpy(rgb[top : top + height, left : left + width].copy()).permute(2, 0, 1)
        if (height, width) != self.size:
            # as torchvision's resize, without the 40 µs that it takes to find this out
            image = F.interpolate(image[None], self.size, mode=self.interpolation, antialias=True)[0]
        if self.flip and rng.random() < self.flip:
            image = image.flip(-1)
        if self.color_jitter and rng.random() < self.color_jitter_prob:
            image = self._jitter(image, rng)
        if self.grayscale and rng.random() < self.grayscale:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        return image

    def _crop(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop; area and ratio are drawn as torchvision's RandomResizedCrop does."""
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = math.exp(rng.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        return (height - h) // 2, (width - w) // 2, h, w

    def _jitter(self, image: Tensor, rng: random.Random) -> Tensor:
        brightness, contrast, saturation, hue = self.color_jitter
        steps: list[Callable[[Tensor], Tensor]] = [
            lambda x: TF.adjust_brightness(x, rng.uniform(max(0.0, 1 - brightness), 1 + brightness)),
            lambda x: TF.adjust_contrast(x, rng.uniform(max(0.0, 1 - contrast), 1 + contrast)),
            lambda x: TF.adjust_saturation(x, rng.uniform(max(0.0, 1 - saturation), 1 + saturation)),
            lambda x: TF.adjust_hue(x, rng.uniform(-hue, hue)),
        ]
        rng.shuffle(steps)
        for step in steps:
            image = step(image)
        return image


def _scaled(box: tuple[int, int, int, int], size: tuple[int, int], now: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Top, left, height and width of a box in a picture, where the picture is smaller than it was."""
    if now[:2] == size:
        return box
    top, left, height, width = box
    edges = [round(y * now[0] / size[0]) for y in (top, top + height)]
    sides = [round(x * now[1] / size[1]) for x in (left, left + width)]
    return edges[0], sides[0], max(1, edges[1] - edges[0]), max(1, sides[1] - sides[0])


@dataclass(frozen=True)
class Captions:
    """Where the captions of a sample are: `txt`, or `json.NAME` for a string or a list in the `json` member; or several
    such fields, each with its probability."""

    source: str | Mapping[str, float] = "txt"
    lines: bool = False
    """A `txt` member holds one caption a line."""
    member: str = field(init=False)
    """Members that hold them, separated by semicolons."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "member", ";".join(dict.fromkeys(name.split(".")[0] for name in self._fields)))

    @functools.cached_property
    def _fields(self) -> dict[str, float]:
        """In an order of their own: that in which they are written must not change what is drawn."""
        return {self.source: 1.0} if isinstance(self.source, str) else dict(sorted(self.source.items()))

    def all(self, sample: Sample) -> list[str]:
        """Every caption of a sample, at least one, none of them blank.

        Raises:
            ValueError: no member or field is there, or they hold no text.
        """
        captions = self.written(sample)
        if not captions:
            raise ValueError(f"sample {sample['__key__']} has no text in {' or '.join(self._fields)}")
        return captions

    def written(self, sample: Sample) -> list[str]:
        """As `all`, but none where the members and fields are there and hold no text."""
        found, faults = [], []
        for name in self._fields:
            try:
                found += self._of(sample, name)
            except ValueError as error:
                faults.append(str(error))
        if len(faults) == len(self._fields):
            raise ValueError("; ".join(faults))
        return found

    def one(self, sample: Sample, rng: random.Random, fits: Callable[[str], bool] | None = None) -> str:
        """One caption, chosen at random where there are several; of several fields by their probabilities, among those
        that the sample has.

        Args:
            fits: no other caption is chosen.

        Raises:
            ValueError: as of `all`, or none fits.
        """
        left, fault = dict(self._fields), None
        while left:
            name = rng.choices(list(left), list(left.values()))[0] if len(left) > 1 else next(iter(left))
            del left[name]
            try:
                captions = self._of(sample, name)
            except ValueError as error:
                fault = fault or error
                continue
            if fits is not None:
                captions = [c for c in captions if fits(c)]
            if captions:
                return captions[0] if len(captions) == 1 else rng.choice(captions)
        raise fault or ValueError(f"sample {sample['__key__']} has no text in {' or '.join(self._fields)}")

    def _of(self, sample: Sample, name: str) -> list[str]:
        """The captions of a field, which may be none.

        Raises:
            ValueError: it is not there, or no text.
        """
        extension, _, key = name.partition(".")
        data = member(sample, extension)
        if data is None:
            raise ValueError(f"sample {sample['__key__']} has no {extension} member")
        found = _from_json(sample, data, key) if key else _text(sample, data)
        lines = found.split("\n") if isinstance(found, str) and self.lines else found
        captions = [c.strip() for c in ([lines] if isinstance(lines, str) else lines)]
        return [c for c in captions if c]


def _from_json(sample: Sample, data: bytes, name: str) -> str | list[str]:
    try:
        record: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"sample {sample['__key__']}: its json member cannot be read: {error}") from error
    found = record.get(name) if isinstance(record, dict) else None
    if isinstance(found, str) or (isinstance(found, list) and all(isinstance(c, str) for c in found)):
        return found
    has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
    raise ValueError(f"sample {sample['__key__']}: json field {name!r} is not text; the record has: {has}")


def _text(sample: Sample, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"sample {sample['__key__']}: its caption is not UTF-8") from error
