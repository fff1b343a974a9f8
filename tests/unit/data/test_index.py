"""The index of shards, and the manifests of other tools."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import clipq.data.index as module
from clipq.data.index import INDEX, Entry, index_shards, read_counts, read_index
from clipq.data.shards import BrokenShardError
from tests.helpers import colour_samples, write_shard

COUNTS = [20, 11, 17, 5, 20]
"""Of the fixture `shards`."""


def indexed(shards: list[str], **options: Any) -> dict[str, Entry | BrokenShardError]:
    return {shard: found for shard, found, _ in index_shards(shards, **options)}


@pytest.mark.parametrize("workers", [1, 2])
def test_index_says_what_is_there(shards: list[str], workers: int) -> None:
    found = indexed(shards, workers=workers)
    record = json.loads((Path(shards[0]).parent / INDEX).read_text())
    assert record == {
        "version": 1,
        "shards": {
            Path(shard).name: {
                "samples": count,
                "bytes": len(Path(shard).read_bytes()),
                "sha256": hashlib.sha256(Path(shard).read_bytes()).hexdigest(),
            }
            for shard, count in zip(shards, COUNTS, strict=True)
        },
    }
    assert {Path(s).name: e._asdict() for s, e in found.items() if isinstance(e, Entry)} == record["shards"]
    assert read_counts(shards) == COUNTS


def test_all_samples_count_whatever_their_members(tmp_path: Path) -> None:
    shard = str(write_shard(tmp_path / "x.tar.gz", [{"txt": "a"}, {"png": b"1", "cls": "0"}, {"json": "{}"}]))
    indexed([shard])
    assert read_counts([shard]) == [3]


def test_each_folder_has_its_own(tmp_path: Path) -> None:
    shards = [str(write_shard(tmp_path / folder / "0.tar", colour_samples(n))) for folder, n in (("a", 2), ("b", 3))]
    indexed(shards)
    assert [read_index(tmp_path / folder)["0.tar"].samples for folder in ("a", "b")] == [2, 3]
    assert read_counts(shards[::-1]) == [3, 2]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read."""
    names: list[str] = []
    original = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda shard, **more: names.append(shard) or original(shard, **more))
    return names


def test_restart_reads_what_is_new(shards: list[str], opened: list[str]) -> None:
    with closing(index_shards(shards)) as results:  # stopped
        stopped = [next(results).shard for _ in range(2)]
    assert set(read_index(Path(shards[0]).parent)) == {Path(s).name for s in stopped}
    opened.clear()
    again = list(index_shards(shards))
    assert opened == [s for s in shards if s not in stopped]
    assert [i.shard for i in again if not i.read] == stopped
    opened.clear()
    whole = (Path(shards[0]).parent / INDEX).read_bytes()
    indexed(shards)
    assert opened == []
    assert (Path(shards[0]).parent / INDEX).read_bytes() == whole
    write_shard(Path(shards[3]), colour_samples(60))
    indexed(shards)
    assert opened == [shards[3]], "its size is another"
    assert read_counts(shards)[3] == 60
    opened.clear()
    indexed(shards, again=True)
    assert opened == shards


def test_index_is_written_now_and_then(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)
    with closing(index_shards(shards)) as results:
        for number, _ in enumerate(results, 1):
            assert len(read_index(Path(shards[0]).parent)) == number


def test_damaged_shards_are_named_and_not_in_it(shards: list[str]) -> None:
    indexed(shards)
    data = Path(shards[1]).read_bytes()
    Path(shards[1]).write_bytes(data[: len(data) // 2])
    Path(shards[2]).write_bytes(b"")
    found = indexed(shards)
    assert [s for s, f in found.items() if isinstance(f, BrokenShardError)] == [shards[1], shards[2]]
    assert "samples were read before" in str(found[shards[1]])
    assert shards[1] not in str(found[shards[1]]), "it is said once"
    assert read_counts(shards) == [20, None, None, 5, 20]


def test_shards_that_are_gone_are_taken_out(shards: list[str], caplog: pytest.LogCaptureFixture) -> None:
    indexed(shards)
    Path(shards[0]).unlink()
    write_shard(Path(shards[1]), colour_samples(60))
    indexed(shards[1:])
    assert "00000.tar" not in read_index(Path(shards[0]).parent)
    assert "1 shards are gone and taken out: 00000.tar" in caplog.text


def test_a_failed_write_leaves_the_index_as_it_was(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    indexed(shards[:2])
    folder = Path(shards[0]).parent
    before = (folder / INDEX).read_bytes()

    def fails(descriptor: int) -> None:
        raise OSError("disk")

    monkeypatch.setattr(module.os, "fsync", fails)
    with pytest.raises(OSError, match="disk"):
        indexed(shards)
    assert (folder / INDEX).read_bytes() == before
    assert not list(folder.glob(".*"))


def put(folder: Path, **files: Any) -> None:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


def test_manifests_in_turn(tmp_path: Path) -> None:
    entry = {"samples": 1, "bytes": 10, "sha256": "0"}
    put(tmp_path, clipq_index={"version": 1, "shards": {"0.tar": entry}})
    put(tmp_path, sizes={"0.tar": 2, "1.tar": 2})
    put(tmp_path, **{f"{n}_stats": {"successes": 3, "count": 9} for n in range(3)})
    shards = [str(tmp_path / name) for name in ("3.tar", "2.tar.gz", "1.tar", "0.tar")]
    assert read_counts([*shards, "s3://bucket/0.tar", "pipe:cat 0.tar"]) == [None, 3, 2, 1, None, None]
    assert read_counts([]) == []


def test_manifests_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, sizes={f"{n}.tar": n for n in range(50)})
    read: list[Path] = []
    original = module._json
    monkeypatch.setattr(module, "_json", lambda path, shape: read.append(path) or original(path, shape))
    assert read_counts([str(tmp_path / f"{n}.tar") for n in range(50)]) == list(range(50))
    assert sorted(p.name for p in read) == [INDEX, "sizes.json"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("clipq_index", "{", "expected JSON such as"),
        ("clipq_index", "[]", "expected JSON such as"),
        ("clipq_index", {"version": 2, "shards": {}}, "is of version 2, and this clipq reads version 1"),
        ("clipq_index", {"version": 1}, '"samples": 1000'),
        ("clipq_index", {"shards": {"0.tar": {"samples": 1}}}, '"samples": 1000'),
        ("clipq_index", {"shards": {"0.tar": {"samples": "1", "bytes": 1, "sha256": "0"}}}, '"samples": 1000'),
        ("clipq_index", {"shards": {"0.tar": 7}}, '"samples": 1000'),
        ("sizes", {"0.tar": -1}, '"00000.tar": 1000'),
        ("sizes", {"0.tar": True}, '"00000.tar": 1000'),
        ("sizes", "\0", '"00000.tar": 1000'),
        ("0_stats", {}, '"successes": 1000'),
        ("0_stats", {"successes": 1.5}, '"successes": 1000'),
    ],
)
def test_malformed_manifests(name: str, content: Any, says: str, tmp_path: Path) -> None:
    put(tmp_path, **{name: content})
    with pytest.raises(ValueError, match=says) as told:
        read_counts([str(tmp_path / "0.tar")])
    assert str(tmp_path / f"{name}.json") in str(told.value)
