"""The photographs that provoke a spike: once through a red filter, once in full colour."""

from __future__ import annotations

import io
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from clipq.data.decode import decode_rgb
from clipq.data.shards import expand, read_shard

SHARDS, PER_SHARD = 16, 1792


def make_shards(source: str, work: Path) -> None:
    """WORK/red and WORK/colour: the first pairs of the shards `source`, the same in the same order.

    Raises:
        SystemExit: there are too few pairs.
    """
    samples = [sample for shard in expand(source) for sample in read_shard(shard)]
    if len(samples) < SHARDS * PER_SHARD:
        raise SystemExit(f"{source}: {SHARDS * PER_SHARD:,} pairs are wanted, {len(samples):,} are there")
    for kind in ("red", "colour"):
        (work / kind).mkdir(parents=True, exist_ok=True)
    parts = [samples[n * PER_SHARD :][:PER_SHARD] for n in range(SHARDS)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(_write_shard, [work] * SHARDS, range(SHARDS), parts))


def _write_shard(work: Path, number: int, samples: list[dict[str, Any]]) -> None:
    name = f"{number:05}.tar"
    with wds.TarWriter(str(work / "red" / name)) as red, wds.TarWriter(str(work / "colour" / name)) as colour:  # pyright: ignore
        for sample in samples:
            image, row = decode_rgb(sample["jpg"]), {"__key__": sample["__key__"], "txt": sample["txt"]}
            red.write(row | {"jpg": _encode(_red_filter(image))})
            colour.write(row | {"jpg": _encode(image)})


def _red_filter(image: np.ndarray) -> np.ndarray:
    """What a red filter lets through: green and blue are black."""
    return image * np.array([1, 0, 0], np.uint8)


def _encode(image: np.ndarray) -> bytes:
    """As a JPEG that stores red, green and blue as they are: black channels stay black."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0, keep_rgb=True)
    return buffer.getvalue()
