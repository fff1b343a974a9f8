"""Shards behind a real HTTP server that fails in many ways, and behind the S3 interface of a real server."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from clipq.data import remote
from clipq.data.shards import Damage, check_members, read_shard
from tests.helpers import colour_samples, write_shard

COUNT = 300
"""Samples of the shard; it is of several blocks."""


class Handler(BaseHTTPRequestHandler):
    """/KIND/N.tar: the shard, where KIND says what goes wrong."""

    protocol_version = "HTTP/1.1"
    content = b""
    asked: ClassVar[Counter[str]] = Counter()

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(404 if kind == "missing" else 200)
        self.send_header("Content-Length", "0" if kind == "missing" else str(len(self.content)))
        if kind != "whole":
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.asked[kind] += 1
        number = self.asked[kind]
        data, ranges = self.content, re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if kind == "missing" or (kind == "busy" and number <= 3) or kind == "down":
            self.send_error(404 if kind == "missing" else 503)
            return
        if kind == "page":
            data, ranges = b"<html>please log in</html>" * 100, None
        partial = ranges is not None and kind != "whole"
        if partial and kind == "later":  # not the part that was asked for
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {len(data) - 100}-{len(data) - 1}/{len(data)}")
            data = data[-100:]
        elif partial:
            end = int(ranges[2]) + 1 if ranges[2] else len(data)  # pyright: ignore
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {ranges[1]}-{end - 1}/{len(data)}")  # pyright: ignore
            data = data[int(ranges[1]) : end]  # pyright: ignore
        else:
            self.send_response(200)
        if kind == "untold" and number == 1:  # its end is that of the connection
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        if kind == "changes":
            self.send_header("ETag", f'"{number}"')
        self.end_headers()
        half = len(data) // 2
        if kind == "drip":
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                self.wfile.flush()
                time.sleep(0.01)
            return
        breaks = {"reset": (1, 2), "whole": (1,), "changes": (1,), "later": (1,)}
        if number in breaks.get(kind, ()) or kind == "always-reset":
            self.wfile.write(data[:half])
            self.wfile.flush()
            self.connection.close()
            return
        if (kind in ("stall", "untold") and number == 1) or kind == "always-stall":
            self.wfile.write(data[:half])
            self.wfile.flush()
            time.sleep(3 * remote.SECONDS)
            self.close_connection = True
            return
        with contextlib.suppress(BrokenPipeError):  # a reader that has seen enough goes
            self.wfile.write(data)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    shard = write_shard(tmp_path_factory.mktemp("remote") / "x.tar", colour_samples(COUNT))
    Handler.content = shard.read_bytes()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    Handler.asked.clear()
    monkeypatch.setattr(remote, "PATIENCE", 0.01)
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    monkeypatch.setattr(remote, "BLOCK", 64 << 10)


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
        ("always-stall", "8 tries failed at byte "),
        ("drip", "slower than 1,000 bytes/s at byte "),
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
    assert Handler.asked[kind] <= 40, "tries are bounded"


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        import s3fs

        files = s3fs.S3FileSystem()
        files.mkdir("shards")
        files.put(str(write_shard(tmp_path / "x.tar.gz", colour_samples(COUNT))), "shards/x.tar.gz")
        assert keys("s3://shards/x.tar.gz") == WHOLE
        assert not [r for r in caplog.records if r.name.startswith("clipq")]
        assert keys("s3://shards/none.tar") == []
        assert "FileNotFoundError" in caplog.text
    finally:
        server.stop()


def test_protocols_are_checked_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"htp://x/0\.tar: Protocol not known: htp; such as http"):
        check_members(["htp://x/0.tar"], ("png",), lambda sample: [])
    check_members(["s3://x/0.tar", "pipe:cat 0.tar"], ("png",), lambda sample: [])

    def absent(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    with pytest.raises(OSError, match=r"s3://x/0\.tar: Install s3fs to access S3\. Install clipq\[remote\]"):
        check_members(["s3://x/0.tar"], ("png",), lambda sample: [])
