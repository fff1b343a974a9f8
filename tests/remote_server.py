"""A real HTTP server whose files fail in many ways, and the S3 interface of a real server."""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from clipq.data import remote


class Handler(BaseHTTPRequestHandler):
    """/KIND/N.tar: one of the files, or else the content, where KIND says what goes wrong."""

    protocol_version = "HTTP/1.1"
    content = b""
    files: ClassVar[dict[str, bytes]] = {}
    """By path."""
    versions: ClassVar[dict[str, str]] = {}
    asked: ClassVar[Counter[str]] = Counter()
    """Requests by kind."""
    requests: ClassVar[list[str]] = []
    """Paths of all of them."""

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(404 if kind == "missing" else 200)
        self.send_header("Content-Length", "0" if kind == "missing" else str(len(self.content)))
        if kind != "whole":
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        kind = path.split("/")[1]
        self.asked[kind] += 1
        self.requests.append(self.path)
        number = self.asked[kind]
        data = self.files.get(path, self.content)
        ranges = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
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
        if (kind == "untold" and number == 1) or kind == "never-told":  # its end is that of the connection
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(data)))
        if kind == "changes":
            self.send_header("ETag", f'"{number}"')
        elif path in self.versions:
            self.send_header("ETag", self.versions[path])
        self.end_headers()
        half = len(data) // 2
        if kind == "drip":
            for at in range(len(data)):
                self.wfile.write(data[at : at + 1])
                self.wfile.flush()
                time.sleep(0.01)
            return
        if kind == "slow":
            with contextlib.suppress(ConnectionError):
                for at in range(0, len(data), len(data) // 40):
                    self.wfile.write(data[at : at + len(data) // 40])
                    self.wfile.flush()
                    time.sleep(0.02)
            return
        if kind == "creep":  # a little further with each connection
            self.wfile.write(data[:2])
            self.wfile.flush()
            self.connection.close()
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
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a reader that has seen enough goes
            self.wfile.write(data)


@contextlib.contextmanager
def http_server(content: bytes) -> Iterator[str]:
    """Its address."""
    Handler.content = content
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what was asked, and lets nothing last long."""
    for kept in (Handler.files, Handler.versions, Handler.asked, Handler.requests):
        kept.clear()
    monkeypatch.setattr(remote, "PATIENCE", 0.01)
    monkeypatch.setattr(remote, "SECONDS", 0.3)
    monkeypatch.setattr(remote, "BLOCK", 64 << 10)


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where s3:// addresses lead meanwhile."""
    import s3fs
    from moto.server import ThreadedMotoServer

    s3fs.S3FileSystem.clear_instance_cache()  # it knows another server

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()  # it has what one before had
    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        yield
    finally:
        server.stop()
