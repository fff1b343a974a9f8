"""Remote shards kept as files: what is read from where, and what never lies in the folder."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clipq.data.cache import HEAD, PART, Cache
from clipq.data.remote import unsigned
from clipq.data.shards import Damage, read_shard
from tests.helpers import colour_samples, write_shard
from tests.kept_shards import COUNT, WHOLE, asked, kept, keys, leftovers, new_run, size_of
from tests.remote_server import Handler, http_server

fork = multiprocessing.get_context("fork")


@pytest.mark.parametrize("kind", ["good", "busy", "reset", "stall", "whole"])
def test_what_was_read_is_read_from_the_disk(kind: str, address: str, shard: bytes, folder: Path) -> None:
    """Also where the connection broke on the way."""
    cache, url = new_run(folder), f"{address}/{kind}/0.tar"
    assert keys(url, cache) == WHOLE
    assert asked() == {"good": 1, "busy": 4, "reset": 3}.get(kind, 2)
    assert keys(url, cache) == WHOLE
    assert asked() == 0
    assert kept(folder) == [url]
    assert cache.path(url).read_bytes()[HEAD:] == shard
    assert leftovers(folder) == []


@pytest.mark.parametrize("kind", ["untold", "never-told"])
def test_nothing_is_kept_whose_size_is_not_told(kind: str, address: str, folder: Path) -> None:
    """Whether it is whole, nobody knows."""
    assert keys(f"{address}/{kind}/0.tar", new_run(folder)) == WHOLE
    assert kept(folder) == leftovers(folder) == []


@pytest.mark.parametrize("kind", ["always-reset", "changes", "later", "page", "missing"])
def test_nothing_is_kept_of_what_fails(kind: str, address: str, folder: Path) -> None:
    told: list[Damage] = []
    assert len(keys(f"{address}/{kind}/0.tar", new_run(folder), told)) < COUNT
    assert len(told) == 1
    assert kept(folder) == leftovers(folder) == []


def test_samples_come_while_the_rest_is_on_its_way(address: str, folder: Path) -> None:
    cache, url = new_run(folder), f"{address}/slow/0.tar"
    samples = read_shard(url, cache=cache)
    began = time.monotonic()
    next(samples)
    first = time.monotonic() - began
    assert len(leftovers(folder)) == 1
    assert len(list(samples)) == COUNT - 1
    assert time.monotonic() - began > 3 * first
    assert kept(folder) == [url]


def test_a_reader_that_stops_leaves_nothing(address: str, folder: Path) -> None:
    cache, url = new_run(folder), f"{address}/good/0.tar"
    samples = read_shard(url, cache=cache)
    list(itertools.islice(samples, COUNT))  # all samples, but not the end of the file
    samples.close()
    with cache.open(url) as stream:
        stream.read(1000)
    assert kept(folder) == leftovers(folder) == []
    assert keys(url, cache) == WHOLE
    samples = read_shard(url, cache=cache)
    next(samples)
    samples.close()
    assert kept(folder) == [url], "one that stops reading a whole file leaves it"


# --- what lies at the address is replaced -------------------------------------------------------------------------


def test_a_run_asks_once_whether_a_file_of_before_is_still_that(address: str, shard: bytes, folder: Path) -> None:
    url, path = f"{address}/good/0.tar", "/good/0.tar"
    Handler.versions[path] = "one"
    before = new_run(folder)
    assert keys(url, before) == WHOLE
    asked()
    cache = new_run(folder)
    assert keys(url, cache) == WHOLE
    assert asked() == 1
    assert keys(url, cache) == WHOLE
    assert asked() == 0, "once a run"

    # another shard of the same size
    half = write_shard(folder.parent / "half.tar", colour_samples(50)).read_bytes()
    Handler.files[path], Handler.versions[path] = half.ljust(len(shard), b"\0"), "two"
    assert keys(url, cache) == WHOLE, "and what is replaced later is seen by the next run"
    assert asked() == 0
    cache = new_run(folder)
    assert keys(url, cache) == WHOLE[:50]
    assert keys(url, cache) == WHOLE[:50]
    assert asked() == 2
    assert keys(url, before) == WHOLE[:50], "runs share the file"
    assert asked() == 0


def test_a_file_is_taken_when_nobody_answers(address: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"{address}/good/0.tar"
    with http_server(Handler.content) as gone:
        keys(f"{gone}/good/0.tar", new_run(folder))
    told: list[Damage] = []
    assert keys(f"{gone}/good/0.tar", new_run(folder), told) == WHOLE
    assert told == []
    assert "cannot ask whether it has changed" in caplog.text

    assert keys(url, new_run(folder)) == WHOLE
    Handler.files["/missing/0.tar"] = b""
    path = new_run(folder).path(f"{address}/missing/0.tar")
    new_run(folder).path(url).rename(path)
    assert keys(f"{address}/missing/0.tar", new_run(folder), told) == []
    assert "HTTP 404" in told[0].text
    assert not path.exists(), "what was taken away is not kept"


def test_signatures_make_no_other_address(address: str, folder: Path) -> None:
    cache = new_run(folder)
    for query in ("X-Amz-Date=1&X-Amz-Signature=a&part=1", "part=1&X-Amz-Signature=b&X-Amz-Date=2", "part=1"):
        assert keys(f"{address}/good/0.tar?{query}", cache) == WHOLE
    assert asked() == 1
    for query in ("part=2", "sp=1", "sp=2"):
        assert keys(f"{address}/good/0.tar?{query}", cache) == WHOLE
    assert asked() == 3, "what else is asked for may be another file"
    assert not any("Amz" in url for url in kept(folder))
    assert unsigned("https://x.blob/0.tar?sv=2&sp=r&sig=abc&snapshot=1#here") == "https://x.blob/0.tar?snapshot=1"
    assert unsigned("s3://b/0.tar?signature=1") == "s3://b/0.tar?signature=1"


# --- the limit ----------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(address: str, shard: bytes, folder: Path) -> None:
    a, b, c, d, e = (f"{address}/good/{name}.tar" for name in "abcde")
    room = 3 * (len(shard) + HEAD)
    cache = new_run(folder, room)
    for url in (a, b, c, a):
        assert keys(url, cache) == WHOLE
    cache = new_run(folder, room)
    assert keys(d, cache) == WHOLE
    assert kept(folder) == [a, c, d]
    assert keys(a, cache) == WHOLE
    assert keys(b, cache) == WHOLE
    assert kept(folder) == [a, b, d]
    assert keys(e, cache) == WHOLE
    assert kept(folder) == [a, b, d], (
        "what this run has used makes no room for what would be gone before it comes again"
    )
    new_run(folder, room - 1)
    assert kept(folder) == [a, b], "a limit that is lower by now holds from the start of a run on"


def test_a_shard_above_the_limit_is_not_kept(address: str, shard: bytes, folder: Path) -> None:
    a, b = f"{address}/good/a.tar", f"{address}/good/b.tar"
    Handler.files["/good/a.tar"] = write_shard(folder.parent / "small.tar", colour_samples(5)).read_bytes()
    assert len(keys(a, new_run(folder, len(shard)))) == 5
    assert keys(b, new_run(folder, len(shard))) == WHOLE
    assert kept(folder) == [a], "and nothing makes room for it in vain"


def _reads(folder: Path, urls: list[str], limit: int, result: Any) -> None:
    cache = Cache(str(folder), limit)
    result.put(Counter(len(keys(url, cache)) for url in urls))


def test_two_readers_of_a_shard(address: str, shard: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As lanes that share one, or the ends of two passes: one keeps it, and the limit holds."""
    cache, url = new_run(folder, len(shard) + HEAD), f"{address}/slow/0.tar"
    first, second = read_shard(url, cache=cache), read_shard(url, cache=cache)
    next(first)
    next(second)
    assert len(leftovers(folder)) == 1
    assert len(list(second)) == COUNT - 1
    assert kept(folder) == []
    assert len(list(first)) == COUNT - 1
    assert kept(folder) == [url]
    assert "told once" not in caplog.text, "nothing is wrong with it"


def test_the_limit_holds_for_all_readers_together(address: str, shard: bytes, folder: Path) -> None:
    limit = int(2.5 * (len(shard) + HEAD))
    new_run(folder, limit)
    urls = [f"{address}/slow/{n}.tar" for n in range(6)]
    results = fork.Queue()
    readers = [
        fork.Process(target=_reads, args=(folder, urls[n:] + urls[:n] + urls[n:], limit, results)) for n in range(4)
    ]
    for reader in readers:
        reader.start()
    most, counts = 0, []
    while len(counts) < len(readers):
        most = max(most, size_of(folder))
        while not results.empty():
            counts.append(results.get())
    for reader in readers:
        reader.join()
    assert all(set(count) == {COUNT} for count in counts)
    assert 2 * len(shard) < most <= limit
    assert leftovers(folder) == []
    assert 1 <= len(kept(folder)) <= 2


def test_who_reads_a_file_that_is_removed_reads_on(address: str, shard: bytes, folder: Path) -> None:
    a, b = f"{address}/good/a.tar", f"{address}/good/b.tar"
    room = len(shard) + HEAD
    keys(a, new_run(folder, room))
    asked()
    reader = read_shard(a, cache=new_run(folder, room))
    found = [next(reader)["__key__"]]
    assert keys(b, new_run(folder, room)) == WHOLE
    assert kept(folder) == [b]
    found += [sample["__key__"] for sample in reader]
    assert found == WHOLE
    assert Handler.requests == ["/good/a.tar", "/good/b.tar"], "whether it has changed, and the other"


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_killed_reader_leaves_nothing_that_is_taken_for_whole(address: str, shard: bytes, folder: Path) -> None:
    cache, url = new_run(folder), f"{address}/slow/0.tar"
    reader = fork.Process(target=keys, args=(url, cache))
    reader.start()
    part = cache.path(url).with_suffix(PART)
    while not part.exists() or part.read_bytes()[HEAD + 20_000 : HEAD + 20_100] == bytes(100):
        time.sleep(0.005)
    assert keys(f"{address}/good/1.tar", cache) == WHOLE, "who needs room leaves the file of another alone"
    assert part.exists()
    assert reader.pid is not None
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    assert part.stat().st_size == len(shard) + HEAD, "it looks whole but for its name"
    asked()
    assert keys(f"{address}/good/2.tar", cache) == WHOLE
    assert not part.exists(), "whoever needs room removes it"
    assert keys(url, cache) == keys(url, cache) == WHOLE
    assert asked() == 2


def test_a_full_disk(address: str, shard: bytes, small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    (small_disk / "other").write_bytes(bytes((2 << 20) - len(shard) // 2))
    cache = new_run(small_disk / "kept")
    assert "is more than the disk of" in caplog.text
    results = [fork.Process(target=keys, args=(f"{address}/good/{n}.tar", cache)) for n in range(2)]
    for process in results:
        process.start()
        process.join()
        assert process.exitcode == 0
    caplog.clear()
    for n in range(3):
        assert keys(f"{address}/good/{n}.tar", cache) == WHOLE
    assert caplog.text == "", "told once, by a process before"
    assert keys(f"{address}/good/9.tar", fresh := new_run(small_disk / "kept")) == WHOLE
    assert keys(f"{address}/good/9.tar", fresh) == WHOLE
    assert caplog.text.count("No space left on device: shards are read without being kept (told once)") == 1
    assert kept(small_disk / "kept") == leftovers(small_disk / "kept") == []


def test_a_folder_that_is_gone(address: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, url = new_run(folder), f"{address}/good/0.tar"
    samples = read_shard(url, cache=cache)
    next(samples)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert len(list(samples)) == COUNT - 1
    folder.write_text("no folder")
    assert keys(url, cache) == keys(url, cache) == WHOLE
    assert caplog.text.count("told once") == 1
    with pytest.raises(ValueError, match=r"data\.cache=.*kept cannot be used \(File exists\): name a folder"):
        cache.check()


def flipped(at: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage_is_not_kept(address: str, shard: bytes, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a transfer that is complete, on the disk, and of the file as a whole."""
    url, told = f"{address}/good/0.tar", []
    cache = new_run(folder)
    middle = shard.index(b"000050.png")
    Handler.files["/good/0.tar"] = flipped(middle)(shard)
    assert len(keys(url, cache, told)) < COUNT
    assert len(told) == 1
    assert kept(folder) == []
    Handler.files.clear()
    assert keys(url, cache) == WHOLE
    path = cache.path(url)
    path.write_bytes(flipped(HEAD + middle)(path.read_bytes()))
    assert len(keys(url, cache)) < COUNT, "the pass that finds it loses it"
    assert keys(url, cache) == WHOLE
    for spoilt in (path.read_bytes()[:-1], b"", b"x" * path.stat().st_size):
        path.write_bytes(spoilt)
        assert keys(url, cache) == WHOLE
    assert caplog.text.count("is damaged: read anew") == 3
