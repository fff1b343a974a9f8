"""`clipq-data verify` on 50 shards with every fault that a shard can have: the report is exactly what was planted."""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest

from clipq.data.check import KINDS
from tests.data_command import run, write_tar
from tests.helpers import encode, picture

SHARDS, PER_SHARD = 50, 6
Members = list[tuple[str, bytes]]


def sound(number: int) -> Members:
    """Members of a shard, with keys that no other has."""
    image = encode(picture("red", number), "JPEG")
    keys = range(number * PER_SHARD, (number + 1) * PER_SHARD)
    return [m for k in keys for m in ((f"{k:06d}.jpg", image), (f"{k:06d}.txt", f"square {k}".encode()))]


def content(change: Callable[[Members], object]) -> Callable[[Path], None]:
    """Another content of a shard whose archive is sound, and of which the index knows."""

    def plant(shard: Path) -> None:
        members = sound(int(shard.stem))
        change(members)
        write_tar(shard, members)

    return plant


def key(name: str, *samples: int) -> Callable[[Path], None]:
    """Other keys of some samples, from a template of their own numbers."""

    def change(members: Members) -> None:
        for sample in samples:
            for at in (2 * sample, 2 * sample + 1):
                old, data = members[at]
                members[at] = (name.format(old), data)

    return content(change)


def at_header(member: int, change: Callable[[bytes, int], bytes]) -> Callable[[Path], None]:
    """Other bytes of an archive, given where the header of a member is."""

    def plant(shard: Path) -> None:
        data = shard.read_bytes()
        with tarfile.open(fileobj=BytesIO(data)) as tar:
            shard.write_bytes(change(data, tar.getmembers()[member].offset))

    return plant


def half_gzip(shard: Path) -> None:
    packed = zlib.compress(shard.read_bytes(), wbits=31)
    shard.write_bytes(packed[: len(packed) // 2])


def swapped(shard: Path) -> None:
    """A caption is another: no archive reader would see it."""
    shard.write_bytes(shard.read_bytes().replace(b"square", b"sphere"))


INDEXED: dict[str, tuple[Callable[[Path], object], list[tuple[str, int]]]] = {
    "sample without image": (content(lambda m: m.__delitem__(4)), [("no image", 1)]),
    "samples without caption": (content(lambda m: (m.__delitem__(9), m.__delitem__(3))), [("no caption", 2)]),
    "blank caption": (content(lambda m: m.__setitem__(3, (m[3][0], b" \n"))), [("bad caption", 1)]),
    "caption of other bytes": (content(lambda m: m.__setitem__(3, (m[3][0], b"\xff\xfe"))), [("bad caption", 1)]),
    "no image at all": (content(lambda m: m.__setitem__(4, (m[4][0], b"<html>"))), [("undecodable", 1)]),
    "half an image": (content(lambda m: m.__setitem__(4, (m[4][0], m[4][1][:-200]))), [("undecodable", 1)]),
    "large member": (content(lambda m: m.append((m[-1][0][:-3] + "bin", bytes(1 << 20)))), [("large member", 1)]),
    "path outward": (key("../../{}", 2, 3), [("path outward", 2)]),
    "absolute path": (key("/tmp/{}", 2), [("path outward", 1)]),
    "keys of shard 0": (content(lambda m: m.__setitem__(slice(0, 4), sound(0)[:4])), [("same key", 2)]),
    "a key twice": (content(lambda m: m.extend(m[:2])), [("same key", 1)]),
    "two faults": (
        content(lambda m: (m.__setitem__(4, (m[4][0], b"")), m.__delitem__(1))),
        [("undecodable", 1), ("no caption", 1)],
    ),
}
"""The index counts these samples as they are."""
AFTERWARDS: dict[str, tuple[Callable[[Path], object], list[tuple[str, int]]]] = {
    "truncated member": (at_header(6, lambda data, at: data[: at + 700]), [("damaged", 1)]),
    "truncated at a member": (at_header(6, lambda data, at: data[:at]), [("damaged", 1)]),
    "truncated between members of a sample": (
        at_header(7, lambda data, at: data[:at]),
        [("no caption", 1), ("damaged", 1)],
    ),
    "no end mark": (lambda shard: shard.write_bytes(shard.read_bytes().rstrip(b"\0") + bytes(500)), [("damaged", 1)]),
    "half a gzip": (half_gzip, [("damaged", 1)]),
    "a header of zeros": (at_header(6, lambda data, at: data[:at] + bytes(512) + data[at + 512 :]), [("damaged", 1)]),
    "a flipped bit in a header": (
        at_header(6, lambda data, at: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]),
        [("damaged", 1)],
    ),
    "first header flipped": (
        at_header(0, lambda data, at: bytes([data[at] ^ 1]) + data[at + 1 :]),
        [("not a tar", 1)],
    ),
    "HTML": (lambda shard: shard.write_bytes(b"<html>404</html>" * 100), [("not a tar", 1)]),
    "no bytes": (lambda shard: shard.write_bytes(b""), [("empty", 1)]),
    "no members": (lambda shard: shard.write_bytes(bytes(10240)), [("empty", 1)]),
    "missing": (Path.unlink, [("missing", 1)]),
    "fewer samples": (content(lambda m: m.__delitem__(slice(-4, None))), [("fewer samples", 1)]),
    "more samples": (content(lambda m: m.extend([("z.jpg", m[0][1]), ("z.txt", b"z")])), [("more samples", 1)]),
    "other bytes": (swapped, [("checksum differs", 1)]),
}
"""The index knows these shards as they were."""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_report_is_what_was_planted(workers: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shards = [tmp_path / f"{number:05d}.tar" for number in range(SHARDS)]
    for number, shard in enumerate(shards):
        write_tar(shard, sound(number))
    planted = Counter[tuple[str, str]]()
    places = iter(shards[1:])  # the first is whole: another has its keys
    for plants in (INDEXED, AFTERWARDS):
        for plant, faults in plants.values():
            shard = next(places)
            plant(shard)
            planted.update({(shard.name, kind): count for kind, count in faults})
        if plants is INDEXED:
            assert run("index", tmp_path / "*.tar") == 0
    capsys.readouterr()
    assert run("verify", tmp_path / "*.tar", "--decode", "--max-member", "0.5", workers=workers) == 1
    lines = capsys.readouterr().out.splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.endswith("samples were read"))
    found = Counter[tuple[str, str]]()
    for line in lines[:at]:
        path, kind, _ = line.split(": ", 2)
        kind, _, times = kind.partition(" (")
        found[Path(path).name, kind] += int(times.split()[0]) if times else 1
    assert found == planted, "\n".join(lines)
    kinds = {kind for _, kind in planted}
    assert kinds == set(KINDS), "each kind is planted"
    table = {row[0]: (int(row[1]), int(row[2])) for row in (line.rsplit(None, 2) for line in lines[at + 2 :])}
    assert table == {
        kind: (
            sum(1 for _, k in planted if k == kind),
            sum(count for (_, k), count in planted.items() if k == kind),
        )
        for kind in kinds
    }
