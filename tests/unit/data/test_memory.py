"""Memory of training and loader processes over many passes: what a pass leaves behind would add up over a long run."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from clipq.data.cache import Cache
from clipq.data.filters import Filter, Range
from clipq.data.loader import batches
from clipq.data.source import Source
from tests.helpers import children, colour_samples, write_shard
from tests.remote_server import Handler, http_server
from tests.streams import TEXT, mixed

pytestmark = pytest.mark.slow

SHARDS, SAMPLES, BATCH = 8, 50, 20
PASSES, SETTLED = 24, 3
"""After so many passes all of a process is in use: buffers are full, and modules that are imported late are there."""
BULK = 20_000
"""Bytes of each sample that are read and not used, so that a pass is of 8 MB."""
MOST = 4 << 20
"""Bytes of growth from then on. The allocator takes a block of 1 MB now and then; 200 kB that stay of each pass would
be found."""


def resident() -> list[int]:
    """Bytes of this process and its loader processes. What they share counts for each, whoever runs beside."""
    found = []
    for pid in [os.getpid(), *sorted(children(os.getpid()))]:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        found.append(pages * os.sysconf("SC_PAGE_SIZE"))
    return found


def run(source: Source, workers: int, result: Path) -> None:
    """In a process of its own: what is resident after each pass."""
    logging.getLogger("clipq").addHandler(logging.NullHandler())
    given = batches(mixed([source], lanes=SHARDS, shuffle=16, batch_size=BATCH), workers=workers, max_lost=1.0)
    found = []
    for _ in range(PASSES):
        for _ in range(SHARDS * SAMPLES // BATCH):
            next(given)
        found.append(resident())
    result.write_text(json.dumps(found))


def growth(source: Source, workers: int, folder: Path) -> list[int]:
    """Bytes by which each process has grown."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(source, workers, folder / "result"))
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 0
    found: list[list[int]] = json.loads((folder / "result").read_text())
    assert {len(of_pass) for of_pass in found} == {1 + workers}
    return [end - begin for begin, end in zip(found[SETTLED - 1], found[-1], strict=True)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, samples = tmp_path_factory.mktemp("data"), colour_samples(SHARDS * SAMPLES)
    samples = [{**sample, "bin": os.urandom(BULK)} for sample in samples]
    parts = [samples[n * SAMPLES : (n + 1) * SAMPLES] for n in range(SHARDS)]
    return [str(write_shard(folder / f"{n}.tar", part)) for n, part in enumerate(parts)]


FILTER: dict[str, Any] = {"filter": Filter(min_size=2, json={"n": Range(40, 1000)}, caption_length=Range(2, 100))}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["plain", "broken", "filter", "remote", "kept"])
def test_memory_does_not_grow(kind: str, workers: int, data: list[str], tmp_path: Path) -> None:
    shards = list(data)
    if kind == "broken":  # one that breaks off, one that is none, a sample that is no image
        half, page, bad = (tmp_path / f"{name}.tar" for name in ("half", "page", "bad"))
        whole = Path(shards[0]).read_bytes()
        half.write_bytes(whole[: len(whole) // 2 + 700])
        page.write_text("<html>")
        write_shard(bad, [{"png": b"no image", "txt": "red 1"}, *colour_samples(SAMPLES - 1)])
        shards[:3] = map(str, (half, page, bad))
    if kind not in ("remote", "kept"):
        grown = growth(Source(shards, TEXT, "png", **(FILTER if kind == "filter" else {})), workers, tmp_path)
    else:
        cache = Cache(str(tmp_path / "kept"), 1 << 30) if kind == "kept" else None
        with http_server(b"") as address:
            Handler.files.update({f"/good/{n}.tar": Path(shard).read_bytes() for n, shard in enumerate(shards)})
            urls = [f"{address}/good/{n}.tar" for n in range(SHARDS)]
            grown = growth(Source(urls, TEXT, "png", cache=cache), workers, tmp_path)
    assert max(grown) < MOST, grown
