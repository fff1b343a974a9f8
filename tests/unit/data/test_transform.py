"""The training transform: its crops against torchvision's, its steps one by one, and that one generator decides."""

from __future__ import annotations

import io
import random
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
import torchvision.transforms.functional as tvF
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from clipq.data.decode import TrainTransform, _scaled
from tests.helpers import encode


def smooth() -> np.ndarray:
    """A picture without a symmetry: [24, 36, 3] uint8."""
    y, x = np.mgrid[:24, :36]
    return np.stack([40 + 5 * x, 20 + 8 * y, 200 - 2 * x - 3 * y], -1).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray | Image.Image) -> int:
    assert a.shape == np.asarray(b).shape
    return int(np.abs(a.astype(int) - np.asarray(b)).max())


def transform(**options: object) -> TrainTransform:
    return TrainTransform((16, 16), **options)  # pyright: ignore


def crops(t: TrainTransform, height: int, width: int, count: int) -> np.ndarray:
    """[count, 4]: top, left, height, width."""
    rng = random.Random(1)
    return np.array([t._crop(height, width, rng) for _ in range(count)])


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((120, 90), (0.9, 1.0), (3 / 4, 4 / 3)),
        ((100, 100), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((200, 60), (0.4, 1.0), (0.5, 2.0)),
    ],
)
def test_crops_are_distributed_as_torchvisions(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    count = 4000
    ours = crops(transform(scale=scale, ratio=ratio), *size, count)
    torch.manual_seed(1)
    image = torch.empty(1, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    for name, value in {
        "area": lambda c: c[:, 2] * c[:, 3],
        "ratio": lambda c: np.log(c[:, 3] / c[:, 2]),
        "top": lambda c: c[:, 0],
        "left": lambda c: c[:, 1],
    }.items():
        # two-sample Kolmogorov-Smirnov; 2.2 is passed once in 15,000 times by samples of one distribution
        a, b = np.sort(value(ours)), np.sort(value(theirs))
        at = np.union1d(a, b)
        distance = np.abs(np.searchsorted(a, at, "right") - np.searchsorted(b, at, "right")).max() / count
        assert distance * np.sqrt(count / 2) < 2.2, name


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 1000), (1000, 3)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (0.1, 0.2), (5.0, 9.0)])
def test_crops_of_long_images_stay_inside(size: tuple[int, int], ratio: tuple[float, float]) -> None:
    for top, left, height, width in crops(transform(ratio=ratio, scale=(0.9, 1.0)), *size, 50):
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        assert min(height, width) >= 1
    assert transform(ratio=ratio)(encode(Image.new("RGB", size)), random.Random(0)).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (7, 5)])
def test_result_is_the_crop_resized(size: tuple[int, int]) -> None:
    few = np.random.default_rng(0).integers(40, 216, (3, 4, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(few).resize(size[::-1], Image.Resampling.BICUBIC))
    t = TrainTransform((16, 20), "bicubic", scale=(0.5, 1.0))
    image = t(encode(Image.fromarray(pixels)), random.Random(3))
    assert image.dtype == torch.uint8
    assert image.shape == (3, 16, 20)
    top, left, height, width = t._crop(*size, random.Random(3))
    cropped = Image.fromarray(pixels[top : top + height, left : left + width])
    by_pillow = tvF.resize(cropped, [16, 20], InterpolationMode.BICUBIC)
    assert difference(image.permute(1, 2, 0).numpy(), by_pillow) <= 2


def test_transform_depends_on_nothing_but_its_generator() -> None:
    data = encode(Image.fromarray(smooth()))
    t = transform(flip=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3, scale=(0.3, 1.0))
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [t(data, random.Random(seed)) for seed in range(30)]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert (np.random.get_state()[1] == states[2]).all()
    random.seed(7)
    torch.manual_seed(7)
    assert all(torch.equal(a, t(data, random.Random(seed))) for seed, a in enumerate(first))
    assert len({a.numpy().tobytes() for a in first}) == 30


WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def test_flip_mirrors_as_often_as_asked() -> None:
    pixels = smooth()[:16, :16]
    data, t = encode(Image.fromarray(pixels)), transform(flip=0.3, **WHOLE)
    rng, mirrored = random.Random(0), 0
    for _ in range(400):
        image = t(data, rng).permute(1, 2, 0).numpy()
        mirrored += (image == pixels[:, ::-1]).all()
        assert (image == pixels).all() or (image == pixels[:, ::-1]).all()
    assert 80 < mirrored < 160


def test_grayscale_has_the_luma_of_pillow() -> None:
    pixels = smooth()[:16, :16]
    image = transform(grayscale=1.0, **WHOLE)(encode(Image.fromarray(pixels)), random.Random(0))
    assert (image == image[0]).all()
    assert difference(image[0].numpy(), Image.fromarray(pixels).convert("L")) <= 1


@pytest.mark.parametrize("part", range(4))
def test_jitter_of_one_kind_stays_in_its_range(part: int) -> None:
    """Each strength alone: between the two extremes of torchvision's own adjustment, and moving."""
    pixels = smooth()[:16, :16]
    strength = 0.1 if part == 3 else 0.4
    jitter = tuple(strength if i == part else 0.0 for i in range(4))
    adjust = (tvF.adjust_brightness, tvF.adjust_contrast, tvF.adjust_saturation, tvF.adjust_hue)[part]
    middle = 0 if part == 3 else 1
    source = torch.from_numpy(pixels).permute(2, 0, 1)
    ends = torch.stack([adjust(source, middle + s * strength).int() for s in np.linspace(-1, 1, 41)])
    low, high = ends.amin(0) - 4, ends.amax(0) + 4
    data, rng = encode(Image.fromarray(pixels)), random.Random(0)
    t = transform(color_jitter=jitter, color_jitter_prob=1.0, **WHOLE)
    results = [t(data, rng).int() for _ in range(60)]
    assert all(((low <= r) & (r <= high)).all() for r in results)
    spread = torch.stack(results).float().std(0).mean()
    assert spread > 2
    never = transform(color_jitter=jitter, color_jitter_prob=0.0, **WHOLE)
    assert torch.equal(never(data, rng), source)


def test_large_photographs_are_decoded_at_a_smaller_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against PIL's crop and antialiased bicubic of the whole picture, which is OpenCLIP's transform."""
    shapes: list[tuple[int, ...]] = []
    original = simplejpeg.decode_jpeg

    def decode(*args: Any, **options: Any) -> np.ndarray:
        rgb = original(*args, **options)
        shapes.append(rgb.shape)
        return rgb

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    rng = np.random.default_rng(0)
    waves = sum(
        rng.normal(0, 8) * np.sin(rng.uniform(0, 0.15, 2) @ np.mgrid[:480, :640].reshape(2, -1) + rng.uniform(0, 6))
        for _ in range(60)
    )
    picture = (128 + np.reshape(waves, (480, 640, 1)) * np.array([1.0, 0.7, -0.6])).clip(0, 255).astype(np.uint8)
    data = encode(Image.fromarray(picture), "JPEG", quality=92, subsampling=0)
    for size, largest in ((32, 180), (56, 240), (100, 240), (130, 480)):
        t = TrainTransform((size, size), scale=(0.9, 1.0))
        for seed in range(8):
            found = t(data, random.Random(seed)).permute(1, 2, 0).numpy()
            height, width, _ = shapes[-1]
            # crops begin at whole pixels of the smaller picture
            top, left, h, w = _scaled(t._crop(480, 640, random.Random(seed)), (480, 640), (height, width))
            y, x = 480 / height, 640 / width
            box = (left * x, top * y, (left + w) * x, (top + h) * y)
            expected = Image.open(io.BytesIO(data)).resize((size, size), Image.Resampling.BICUBIC, box=box)
            error = np.abs(found.astype(int) - np.asarray(expected))
            assert error.mean() < (1.5 if largest < 480 else 0.1)
        assert {s[0] for s in shapes} <= set(range(2 * size, largest + 1))
        shapes.clear()
