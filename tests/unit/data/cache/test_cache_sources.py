"""Remote shards kept as files: other sources than HTTP, and training from them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from clipq.data.cache import HEAD
from clipq.data.loader import batches
from clipq.data.source import Source
from tests.helpers import colour_samples, write_shard
from tests.kept_shards import COUNT, WHOLE, asked, kept, keys, leftovers, new_run, size_of
from tests.remote_server import Handler, s3_server
from tests.streams import TEXT, mixed, numbers, same, taken


def test_s3(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://kept/x.tar.gz"
    with s3_server(monkeypatch):
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("kept")
        files.put(str(write_shard(tmp_path / "x.tar.gz", colour_samples(COUNT))), url)
        assert keys(url, new_run(folder)) == WHOLE
        assert kept(folder) == [url]
        size = files.info(url)["size"]
        again = write_shard(tmp_path / "y.tar.gz", colour_samples(COUNT - 1)).read_bytes()
        files.pipe(url, again.ljust(size, b"\0"))
        files.invalidate_cache()
        cache = new_run(folder)
        assert keys(url, cache) == WHOLE[:-1], "told apart by its ETag, for its size is the same"
    assert keys(url, cache) == WHOLE[:-1], "the server is gone"


def test_commands_are_not_kept(shard: bytes, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "x.tar").write_bytes(shard)
    assert keys(f"pipe:cat {tmp_path}/x.tar", new_run(folder)) == WHOLE
    assert kept(folder) == []


# --- training -----------------------------------------------------------------------------------------------------


def served(address: str, tmp_path: Path, counts: list[int], kind: str = "good") -> tuple[list[str], list[str]]:
    """The same shards as addresses and as files."""
    files, urls, first = [], [], 0
    for number, count in enumerate(counts):
        files.append(str(write_shard(tmp_path / "files" / f"{number}.tar", colour_samples(count, first))))
        Handler.files[f"/{kind}/{number}.tar"] = Path(files[-1]).read_bytes()
        urls.append(f"{address}/{kind}/{number}.tar")
        first += count
    return urls, files


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("room", [1.0, 0.5])
def test_training_sees_the_same(workers: int, room: float, address: str, folder: Path, tmp_path: Path) -> None:
    """In the same order, from the disk or from afar; resumed too."""
    urls, files = served(address, tmp_path, [20, 11, 17, 5, 20, 14])
    total = sum(len(data) + HEAD for data in Handler.files.values())
    cache = new_run(folder, room * total)
    whole = taken(mixed([Source(files, TEXT, "png")], lanes=3), 60)
    s = mixed([Source(urls, TEXT, "png", cache=cache)], lanes=3)
    given, first = batches(s, workers=workers, max_lost=1.0), len(whole) // 2
    found = list(itertools.islice(given, first))  # two passes and some
    requests = asked()
    assert 6 <= requests < 12
    found += itertools.islice(given, len(whole) - first)
    given.close()
    assert same(found, whole)
    assert (asked() == 0) is (room == 1)
    assert same(taken(s.starting_at(whole[first - 1]["place"]), first, workers), whole[first:])
    assert (asked() == 0) is (room == 1)
    assert leftovers(folder) == []
    assert size_of(folder) <= room * total
    assert set(numbers(whole)) == set(range(87))
