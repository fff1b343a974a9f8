"""Shards behind a real HTTP server that fails in many ways, and behind the S3 interface of a real server."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipq.data.loader import _begin
from clipq.data.remote import open_url
from clipq.data.shards import Damage, check_members, read_shard
from tests.helpers import colour_samples, write_shard
from tests.remote_server import Handler, http_server, impatient, s3_server

COUNT = 300
"""Samples of the shard; it is of several blocks."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    shard = write_shard(tmp_path_factory.mktemp("remote") / "x.tar", colour_samples(COUNT))
    with http_server(shard.read_bytes()) as address:
        yield address


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    impatient(monkeypatch)


def keys(url: str) -> list[str]:
    return [s["__key__"] for s in read_shard(url)]


WHOLE = [f"{n:06d}" for n in range(COUNT)]


@pytest.mark.parametrize("kind", ["good", "busy", "reset", "stall", "whole", "untold"])
def test_faults_that_pass_lose_nothing(kind: str, address: str, caplog: pytest.LogCaptureFixture) -> None:
    """503 three times, a reset connection, a stalled one, a reset from a server that gives no parts of a file, one
    that tells the size with the second answer only."""
    assert keys(f"{address}/{kind}/0.tar") == WHOLE
    assert ("again in" in caplog.text) is (kind != "good")
    assert all(kind == "good" or f"{address}/{kind}/0.tar" in m for m in caplog.messages)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("down", "8 tries failed at byte 0, the last with"),
        ("always-reset", "8 tries failed at byte "),
        ("always-stall", "at byte "),  # 8 tries failed, or too slow 8 times, whichever is first
        ("drip", "slower than 1,000 bytes/s at byte "),
        ("creep", "slower than 1,000 bytes/s at byte "),
        ("changes", "it was changed while it was read"),
        ("later", "it was changed while it was read"),
        ("missing", "FileNotFoundError"),
        ("page", "0 samples were read before"),
    ],
)
def test_faults_that_stay_end_the_shard(kind: str, says: str, address: str) -> None:
    broken: list[Damage] = []
    url = f"{address}/{kind}/0.tar"
    began = time.monotonic()
    found = [s["__key__"] for s in read_shard(url, on_damage=broken.append)]
    assert time.monotonic() - began < 15, "nothing hangs"
    assert len(found) < COUNT
    assert found == WHOLE[: len(found)]
    assert [(damage.shard, damage.kind) for damage in broken] == [(url, "damaged")]
    assert says in broken[0].text
    assert Handler.asked[kind] <= (500 if kind == "creep" else 40), "tries are bounded"


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with s3_server(monkeypatch):
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("shards")
        files.put(str(write_shard(tmp_path / "x.tar.gz", colour_samples(COUNT))), "shards/x.tar.gz")
        assert keys("s3://shards/x.tar.gz") == WHOLE
        assert not [r for r in caplog.records if r.name.startswith("clipq")]
        assert keys("s3://shards/none.tar") == []
        assert "FileNotFoundError" in caplog.text


def test_protocols_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"htp://x/0\.tar: Protocol not known: htp; such as http"):
        check_members(["htp://x/0.tar"], ("png",), lambda sample: [])
    check_members(["s3://x/0.tar", "pipe:cat 0.tar"], ("png",), lambda sample: [])

    def absent(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    with pytest.raises(OSError, match=r"s3://x/0\.tar: Install s3fs to access S3\. Install clipq\[remote\]"):
        check_members(["s3://x/0.tar"], ("png",), lambda sample: [])


def test_a_command_that_gives_nothing_is_ended(tmp_path: Path) -> None:
    """With all that it has started."""
    shard = write_shard(tmp_path / "x.tar", colour_samples(99))
    broken: list[Damage] = []
    began = time.monotonic()
    command = f"head -c 20000 {shard}; sleep 1000 & echo $! > {tmp_path}/pid; wait"
    read = list(read_shard(f"pipe:{command}", on_damage=broken.append))
    assert time.monotonic() - began < 15
    assert 0 < len(read) < 99
    assert "nothing for 0.3 s from: head -c 20000" in broken[0].text
    gone = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    while gone.exists() and gone.read_text().split()[2] != "Z":
        assert time.monotonic() - began < 15, "it outlives its reader"
        time.sleep(0.01)


def test_commands_hear_signals() -> None:
    """Of a loader process too, which itself leaves them to the trainer."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, lambda *_: None)
        _begin(0)
        with open_url("pipe:grep SigIgn /proc/self/status") as pipe:
            ignored = int(pipe.read(1000).split()[1], 16)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not ignored & (1 << (signal.SIGTERM - 1) | 1 << (signal.SIGINT - 1))
