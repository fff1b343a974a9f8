"""`clipq-data verify` finds what is wrong, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipq.data.check import KINDS, same_keys
from clipq.data.index import INDEX
from tests.data_command import run, write_tar
from tests.helpers import encode, picture

SHARDS, PER_SHARD = 50, 4


def sound(number: int) -> list[tuple[str, bytes]]:
    """Members of a shard, with keys that no other has."""
    keys = range(number * PER_SHARD, (number + 1) * PER_SHARD)
    image = encode(picture("red", number), "JPEG")
    return [m for k in keys for m in ((f"{k:06d}.jpg", image), (f"{k:06d}.txt", f"square {k}".encode()))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """50 sound shards and their index."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(SHARDS):
        write_tar(folder / f"{number:05d}.tar", sound(number))
    assert run("index", folder / "*.tar") == 0
    return folder


def cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:3000])


def flipped(shard: Path) -> None:
    """A caption is another: no archive reader would see it."""
    shard.write_bytes(shard.read_bytes().replace(b"square 30", b"square 31"))


def with_members(
    change: Callable[[list[tuple[str, bytes]]], object], *, indexed: bool = True
) -> Callable[[Path], None]:
    """Writes the shard with other members, and as many samples; into the index too, unless this is what is at fault."""

    def plant(shard: Path) -> None:
        members = sound(int(shard.stem))
        change(members)
        write_tar(shard, members)
        if indexed:
            assert run("index", shard, "--again") == 0

    return plant


def renamed(old: str, new: str) -> Callable[[list[tuple[str, bytes]]], None]:
    def change(members: list[tuple[str, bytes]]) -> None:
        members[:] = [(name.replace(old, new), data) for name, data in members]

    return change


def content(at: int, data: bytes) -> Callable[[list[tuple[str, bytes]]], None]:
    def change(members: list[tuple[str, bytes]]) -> None:
        members[at] = (members[at][0], data)

    return change


PLANTED: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda shard: shard.write_bytes(b""),
    "not a tar": lambda shard: shard.write_bytes(b"<html>404</html>" * 100),
    "damaged": cut,
    "fewer samples": with_members(lambda m: m.__delitem__(slice(-2, None)), indexed=False),
    "more samples": with_members(lambda m: m.extend([("z.jpg", m[0][1]), ("z.txt", b"z")]), indexed=False),
    "checksum differs": flipped,
    "no image": with_members(lambda m: m.__delitem__(2)),
    "no caption": with_members(lambda m: m.__delitem__(3)),
    "bad caption": with_members(content(3, b" \n")),
    "undecodable": with_members(content(2, b"<html>404</html>")),
    "path outward": with_members(renamed("000030", "../../000030")),
    "same key": with_members(renamed("000030", "000003")),
    "large member": with_members(lambda m: m.append(("000031.bin", bytes(1 << 20)))),
}


def verified(capsys: pytest.CaptureFixture[str], *arguments: object, status: int, workers: int = 1) -> dict[str, str]:
    """Kind -> (shards, samples) of the table, and the lines before, of a kind each."""
    capsys.readouterr()
    assert run("verify", *arguments, "--max-member", "0.5", workers=workers) == status
    lines = capsys.readouterr().out.splitlines()
    (at,) = (n for n, line in enumerate(lines) if line.endswith("samples were read"))
    told = {line.split(": ", 2)[1].split(" (")[0]: line for line in lines[:at]}
    assert list(told) == [k for k in told if k in KINDS]
    table = [line.rsplit(None, 2) for line in lines[at + 2 :]]
    assert {row[0] for row in table} == set(told)
    return told


@pytest.mark.parametrize("kind", KINDS)
def test_verify_finds_a_planted_fault_and_nothing_else(kind: str, data: Path, capsys: pytest.CaptureFixture) -> None:
    assert verified(capsys, data / "*.tar", status=0) == {}
    shard = data / "00007.tar"  # samples 28 to 31
    PLANTED[kind](shard)
    told = verified(capsys, data / "*.tar", "--decode", status=1)
    assert list(told) == [kind]
    assert told[kind].startswith(f"{shard}: {kind}")
    if kind == "same key":
        assert "in " + str(data / "00000.tar") in told[kind]
        assert "sample 2, from 0, has that of sample 3 there" in told[kind]


def test_verify_decodes_only_when_asked(data: Path, capsys: pytest.CaptureFixture) -> None:
    whole = encode(Image.effect_noise((64, 64), 90), "PNG")
    with_members(content(2, whole[: len(whole) // 2]))(data / "00007.tar")
    assert verified(capsys, data / "*.tar", status=0) == {}
    assert list(verified(capsys, data / "*.tar", "--decode", status=1)) == ["undecodable"]


def test_verify_compares_with_other_manifests(data: Path, capsys: pytest.CaptureFixture) -> None:
    (data / INDEX).unlink()
    (data / "sizes.json").write_text(json.dumps({"00007.tar": PER_SHARD + 1}))
    assert list(verified(capsys, data / "*.tar", status=1)) == ["fewer samples"]


def test_verify_names_files_that_do_not_exist(data: Path, capsys: pytest.CaptureFixture) -> None:
    (data / INDEX).unlink()
    told = verified(capsys, str(data / "{00048..00050}.tar"), status=1)
    assert list(told) == ["missing"]
    assert told["missing"].startswith(str(data / "00050.tar"))


def test_same_keys_against_a_plain_count() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        keys = {f"{n}": rng.integers(0, 40, rng.integers(0, 12)).astype(np.uint64) for n in range(6)}
        first: dict[int, str] = {}
        pairs: Counter[tuple[str, str]] = Counter()
        for shard, own in keys.items():
            for key in own.tolist():
                if key in first:
                    pairs[shard, "the shard itself" if first[key] == shard else first[key]] += 1
                else:
                    first[key] = shard
        found = {(f.shard, f.text.split(" are in ")[1].split(" too")[0]): f.count for f in same_keys(keys)}
        assert found == pairs
