"""One faulty shard among good ones, of each kind: what exactly is delivered, lost and told, under a memory limit.

The manifest says that each shard holds twelve samples.
"""

from __future__ import annotations

import gzip
import itertools
import json
import logging
import multiprocessing
import re
import resource
import struct
import tarfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import pytest

from clipq.data.loader import batches
from clipq.data.source import Source
from tests.helpers import colour_samples, write_shard
from tests.streams import TEXT, mixed, numbers

SAMPLES = 12
FIRST = 100
"""Number of the faulty shard's first sample; those of the good ones are below."""
SPARE_MEMORY = 700 << 20
"""Bytes above those that the process has before: members of up to 256 MB may be read, and are copied once."""


class Case(NamedTuple):
    plant: Callable[[Path, bytes], None]
    """Makes the faulty shard of a path, given the bytes of a good one."""
    kept: set[int]
    """Samples of the shard that are delivered, from 0."""
    lost: int
    """What the batches report: samples in whose place others came, and the shard."""
    says: str
    """In the log, once."""
    places: int = SAMPLES
    """Of the shard in the pass. Samples that are no image with a caption have none."""
    left_out: str = ""
    """Why one sample has none, in the counts."""


def offset(data: bytes, member: str) -> int:
    """Where the header of a member begins."""
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        return tar.getmember(member).offset


def cut_in(member: str, after: int) -> Callable[[Path, bytes], None]:
    return lambda path, data: path.write_bytes(data[: offset(data, member) + after]) and None


def replaced(member: str, new: Callable[[bytes], bytes]) -> Callable[[Path, bytes], None]:
    """With another header of a member."""

    def plant(path: Path, data: bytes) -> None:
        at = offset(data, member)
        path.write_bytes(data[:at] + new(data[at : at + 512]) + data[at + 512 :])

    return plant


def half_gzip(path: Path, data: bytes) -> None:
    packer = zlib.compressobj(wbits=31)
    whole = packer.compress(data[: offset(data, "000007.png")]) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(whole + packer.compress(data)[:100])


def changed(change: Callable[[list], None]) -> Callable[[Path, bytes], None]:
    """With other samples."""

    def plant(path: Path, data: bytes) -> None:
        samples = colour_samples(SAMPLES, FIRST)
        change(samples)
        write_shard(path, samples)

    return plant


def without(extension: str) -> Callable[[Path, bytes], None]:
    return changed(lambda samples: samples[4].pop(extension) and None)


def png_of(width: int, height: int) -> bytes:
    """A valid file that begins to unpack to so many pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def with_image(image: bytes) -> Callable[[Path, bytes], None]:
    return changed(lambda samples: samples[4].update(png=image))


def bomb(path: Path, data: bytes) -> None:
    """A member of 3 GiB of zeros before the last sample's caption, in a file of 3 MB."""
    at, size = offset(data, "000011.txt"), 3 << 30
    info = tarfile.TarInfo("000011.bin")
    info.size = size
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(data[:at] + info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(size >> 24):
            out.write(bytes(1 << 24))
        out.write(data[at:])


def renamed(path: Path, data: bytes) -> None:
    """Keys that are paths out of the folder."""
    with tarfile.open(fileobj=BytesIO(data)) as source, tarfile.open(path, "w") as target:
        for info in source:
            content = source.extractfile(info)
            info.name = f"../../{info.name}"
            target.addfile(info, content)


ALL = set(range(SAMPLES))
# The sample before the place of a damage is not used: members of it may be what is damaged.
CASES = {
    "a member cut short": Case(cut_in("000007.png", 600), set(range(6)), 7, r"6 samples were read before"),
    "cut between members": Case(cut_in("000007.txt", 0), set(range(7)), 5, r"no end mark", 11, "no caption"),
    "half a gzip": Case(half_gzip, set(range(6)), 7, r"6 samples were read before"),
    "a header of zeros": Case(replaced("000007.png", lambda _: bytes(512)), set(range(6)), 7, r"goes on after it"),
    "a flipped bit in a header": Case(
        replaced("000007.png", lambda h: bytes([h[0] ^ 1]) + h[1:]), set(range(6)), 7, r"header is damaged"
    ),
    "HTML": Case(lambda path, _: path.write_text("<html>Not found</html>") and None, set(), 13, r"ReadError"),
    "an empty file": Case(lambda path, _: path.write_bytes(b"") and None, set(), 13, r"empty file"),
    "an empty archive": Case(lambda path, _: path.write_bytes(bytes(10240)) and None, set(), 13, r"no samples"),
    "a missing shard": Case(lambda path, _: None, set(), 13, r"No such file"),
    "a sample without caption": Case(without("txt"), ALL - {4}, 0, "", 11, "no caption"),
    "a sample without image": Case(without("png"), ALL - {4}, 0, "", 11, "no image"),
    "no image": Case(with_image(b"<html>"), ALL - {4}, 1, r"sample 000004 .*not an image"),
    "400 megapixels": Case(with_image(png_of(20000, 20000)), ALL - {4}, 1, r"sample 000004 .*pixels"),
    "3 GiB in a gzip": Case(bomb, ALL, 0, r"000011.bin is of 3,221,225,472 bytes: passed over"),
    "paths as keys": Case(renamed, ALL, 0, ""),
    "the keys of another shard": Case(lambda path, data: path.write_bytes(data) and None, ALL, 0, ""),
}


def one_pass(shards: list[str], places: int, log: Path, result: Path) -> None:
    """In a process of its own, under a limit: delivered numbers, and what was lost."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE_MEMORY, -1))
    handler = logging.FileHandler(log)
    logging.getLogger("clipq").addHandler(handler)
    counts: list[int | None] = [SAMPLES] * len(shards)
    stream = mixed([Source(shards, TEXT, "png", counts=counts)], batch_size=1, lanes=1, shuffle=1)
    found = list(itertools.islice(batches(stream, workers=0, max_lost=0.5), places))
    left_out = [why for batch in found for why, count in batch["filtered"].items() for _ in range(count)]
    result.write_text(json.dumps([numbers(found), sum(batch["lost"] for batch in found), left_out]))


@pytest.mark.parametrize("name", CASES)
def test_a_pass_with_one_faulty_shard(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    shards = [write_shard(tmp_path / f"{n}.tar", colour_samples(SAMPLES, n * SAMPLES)) for n in range(5)]
    good = set(range(5 * SAMPLES))
    faulty = tmp_path / "faulty.tar"
    data = write_shard(tmp_path / "whole" / "x.tar", colour_samples(SAMPLES, FIRST)).read_bytes()
    case.plant(faulty, data)
    before = set(tmp_path.parent.iterdir())

    process = multiprocessing.get_context("fork").Process(
        target=one_pass,
        args=([str(s) for s in (*shards, faulty)], len(good) + case.places, tmp_path / "log", tmp_path / "result"),
    )
    process.start()
    process.join(timeout=120)
    process.kill()
    assert process.exitcode == 0, "an error, more memory than it may have, or a hang"

    delivered, lost, left_out = json.loads((tmp_path / "result").read_text())
    kept = {FIRST + n for n in case.kept}
    assert set(delivered) == good | kept
    again = len(delivered) - len(set(delivered))
    assert again == case.places - len(case.kept), "each place that is lost has a spare"
    assert lost == case.lost
    assert left_out == ([case.left_out] if case.left_out else [])
    log = (tmp_path / "log").read_text()
    if case.says:
        assert len(re.findall(case.says, log)) == 1, log
        assert "faulty.tar" in log
    else:
        assert log == ""
    assert set(tmp_path.parent.iterdir()) == before, "a key was taken for a path"
