"""Shards that are not files: `http(s)://`, `pipe:COMMAND`, and what fsspec knows, as `s3://` and `gs://`."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

HTTP = ("http://", "https://")
TRIES = 8
"""Times that a read is tried before its shard is given up: two minutes, in which a server may start anew."""
PATIENCE = 1.0
"""Seconds before the second try; twice as long before each further one."""
SLOW = 1000
"""Bytes a second, below which a connection counts as stalled."""
SECONDS = 60.0
"""Of waiting, before a connection counts as stalled."""
BLOCK = 4 << 20
"""Bytes asked for at a time."""


_SIGNED = re.compile(
    r"x-(amz|goog|oss)-.+|signature|expires|policy|hash-algorithm|key-pair-id|(aws|oss)accesskeyid|googleaccessid"
    r"|security-token",
    re.IGNORECASE,
)
"""Parameters that sign an address, as S3, Google, CloudFront and Alibaba have them."""
_SIGNED_BY_AZURE = re.compile(r"sig|s[eiprstv]|sip|srt|spr|sk[estv]|sk[ot]id")
"""Where there is a `sig`: such short names may mean anything elsewhere."""


class RemoteError(OSError):
    """A shard cannot be read, and trying again did not help."""


def is_url(name: str) -> bool:
    return name.startswith("pipe:") or "://" in name


def unsigned(url: str) -> str:
    """An address without what signs it, which is another each time."""
    if not url.startswith(HTTP):
        return url
    parts = urllib.parse.urlsplit(url)
    named = [(parameter.partition("=")[0], parameter) for parameter in parts.query.split("&")]
    azure = any(name == "sig" for name, _ in named)
    stays = [p for name, p in named if not _SIGNED.fullmatch(name) and not (azure and _SIGNED_BY_AZURE.fullmatch(name))]
    return urllib.parse.urlunsplit(parts._replace(query="&".join(stays), fragment=""))


def open_url(name: str) -> Any:
    """A context manager whose value has `read`, for a shard that is not a file.

    Raises:
        RemoteError: what is needed to read such addresses is not installed.
    """
    return Pipe(name.removeprefix("pipe:")) if name.startswith("pipe:") else RemoteFile(name)


class Pipe:
    """What a shell command writes, read from its start to its end. It is not tried again: commands do that.

    Args:
        command: as in a shell.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        # a session of its own, so that all that the command starts can be ended
        self._process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True)

    def __enter__(self) -> Pipe:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdout is not None
        if self._process.returncode is None:  # its number is not another's yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.stdout.close()
        self._process.wait()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end.

        Raises:
            RemoteError: the command gives nothing for `SECONDS`, or fails.
        """
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        if not select.select([descriptor], [], [], SECONDS)[0]:
            raise RemoteError(f"nothing for {SECONDS:g} s from: {self._command}")
        data = os.read(descriptor, size)
        if not data and (code := self._process.wait()):
            raise RemoteError(f"exit code {code} of: {self._command}")
        return data


class RemoteFile:
    """A remote file read from its start to its end. What fails on the way is tried again from where it failed.

    Args:
        url: an address of HTTP, or one that fsspec knows.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._file: Any = None
        self._at = 0
        self.about: About | None = None
        """What is told of the whole; None before the first byte."""
        self._waited, self._since, self._stalls = 0.0, 0, 0
        """Seconds spent since the byte, and how often that was too slow."""

    def __enter__(self) -> RemoteFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes; none at the end.

        Raises:
            FileNotFoundError, PermissionError: at once.
            RemoteError: after `TRIES`.
        """
        for attempt in range(1, TRIES + 1):
            begun = time.monotonic()
            try:
                self._file = self._file or self._open()
                data = self._file.read1(size)
                self._waited += time.monotonic() - begun
                whole = self.about.size if self.about else None
                if not data and whole is not None and self._at < whole:
                    raise EOFError(f"it ended after {self._at:,} of {whole:,} bytes")
                self._at += len(data)
                self._check_speed()
                return data
            except (FileNotFoundError, PermissionError, RemoteError):
                raise
            except Exception as error:  # each protocol has errors of its own
                self._close()
                what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                if attempt == TRIES:
                    raise RemoteError(f"{TRIES} tries failed at byte {self._at:,}, the last with {what}") from error
                wait = PATIENCE * 2 ** (attempt - 1)
                log.warning("shard %s: %s at byte %d; again in %.3g s", self._url, what, self._at, wait)
                time.sleep(wait)
                self._waited += time.monotonic() - begun
                self._check_speed()  # one that breaks off again and again, each time a little further, comes to an end
        raise AssertionError

    def _check_speed(self) -> None:
        """Opens a connection anew that gives a byte now and then, which no time limit of its own ends.

        Raises:
            RemoteError: that was so `TRIES` times.
        """
        if self._waited < SECONDS:
            return
        if self._at - self._since < SLOW * self._waited:
            self._stalls += 1
            if self._stalls == TRIES:
                raise RemoteError(f"slower than {SLOW:,} bytes/s at byte {self._at:,}, {TRIES} times for {SECONDS:g} s")
            log.warning("shard %s: slower than %d bytes/s at byte %d: connecting anew", self._url, SLOW, self._at)
            self._close()
        self._waited, self._since = 0.0, self._at

    def _open(self) -> Any:
        """The file, at the byte where the last try failed."""
        file, at, about = (_open_http if self._url.startswith(HTTP) else _open_fsspec)(self._url, self._at)
        before = self.about or about
        if before.differs(about) or at > self._at:
            file.close()
            raise RemoteError(f"it was changed while it was read ({before}, and then {about} from byte {at:,})")
        size = before.size if about.size is None else about.size
        self.about = About(size, about.version or before.version)
        begun, start = time.monotonic(), at
        while at < self._at:  # the server gives no parts of a file
            skipped = len(file.read1(min(self._at - at, BLOCK)))
            if not skipped:
                raise EOFError(f"it ends before byte {self._at:,}, where the try before failed")
            at += skipped
            if at - start < SLOW * (time.monotonic() - begun - SECONDS):
                raise TimeoutError(f"slower than {SLOW:,} bytes/s on the way to where the try before failed")
        return file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None


class About(NamedTuple):
    """What a server tells of a file, as far as it does."""

    size: int | None
    """Bytes of the whole."""
    version: str | None

    def differs(self, other: About) -> bool:
        """Whether both tell of something, and not the same."""
        return any(a is not None and b is not None and a != b for a, b in zip(self, other, strict=True))


def _open_http(url: str, at: int, end: int | None = None) -> tuple[Any, int, About]:
    """A response, where its body begins, and what is told of the whole; to the byte `end`, or all."""
    part = {} if at == 0 and end is None else {"Range": f"bytes={at}-{'' if end is None else end}"}
    headers = {"User-Agent": "clipq"} | part
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (404, 410):
            raise FileNotFoundError(f"HTTP {error.code}") from error
        if error.code in (401, 403):
            raise PermissionError(f"HTTP {error.code}") from error
        raise
    start, size = 0, response.headers.get("Content-Length")
    if response.status == 206:
        part = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if part is None:
            raise OSError("HTTP 206 without a Content-Range")
        start, size = int(part[1]), None if part[2] == "*" else part[2]
    version = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return response, start, About(None if size is None else int(size), version)


def _open_fsspec(url: str, at: int) -> tuple[Any, int, About]:
    import fsspec

    files, path = fsspec.core.url_to_fs(url, **limits(url))
    file = files.open(path, "rb", block_size=BLOCK, cache_type="readahead")
    file.seek(at)
    details = getattr(file, "details", None) or {}
    return io.BufferedReader(file, BLOCK), at, About(file.size, details.get("ETag") or details.get("etag"))


def look(url: str) -> About:
    """What is told of a file now, for one request of a byte: signed addresses refuse to be asked for none."""
    file, _, about = _open_http(url, 0, end=0) if url.startswith(HTTP) else _open_fsspec(url, 0)
    file.close()
    return about


def require_protocol(url: str) -> None:
    """Checks that what reads such addresses is installed.

    Raises:
        RemoteError: it is not.
        ValueError: fsspec knows no such protocol.
    """
    if url.startswith(("pipe:", *HTTP)):
        return
    import fsspec

    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except ImportError as error:
        raise RemoteError(f"{url}: {error}. Install clipq[remote]") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}; such as http, https, s3 and gs are") from error


def limits(url: str) -> dict[str, Any]:
    """Time limits: nothing may hang, and it is tried again here."""
    if url.startswith("s3://"):
        limits = {"connect_timeout": SECONDS, "read_timeout": SECONDS, "retries": {"max_attempts": 1}}
        return {"config_kwargs": limits}
    return {}
