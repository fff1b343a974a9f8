"""Remote shards kept as files: a shard that was read to its end is read from the disk from then on.

Processes, ranks and runs of a host share a folder. Under the name of an address is a whole shard or none: one that is
being read has another name and is locked by its reader, so that what a killed process leaves is known by its free
lock. Each file has its full size from its beginning, so that sizes tell what will have been written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from clipq.data.remote import About, RemoteFile, look, open_url, unsigned

log = logging.getLogger(__name__)

HEAD = 4096
"""Bytes before those of the shard: a line of JSON that says of what address and version it is."""
PART = ".part"
_NAME = re.compile(r"[0-9a-f]{64}(\.part)?")


class Cache:
    """Remote shards in a folder on a disk of this host.

    Args:
        limit: bytes of all files in it, those being written among them.
    """

    def __init__(self, folder: str, limit: int) -> None:
        self.folder = Path(folder).expanduser().absolute()
        self.limit = limit
        self._begun = time.time_ns()
        self._told = mmap.mmap(-1, 2)  # shared with loader processes, which are forked: one of them tells

    def check(self) -> None:
        """Makes the folder, brings it down to the limit, and sees that it can be written to.

        Raises:
            ValueError: it cannot be used.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder), self._alone():
                self._make_room(0)
                free = shutil.disk_usage(self.folder).free + sum(size for _, size, _ in self._files())
        except OSError as error:
            raise ValueError(
                f"data.cache={self.folder} cannot be used ({error.strerror or error}): name a folder that can be "
                "written to, on a disk of this host, or leave data.cache at null"
            ) from error
        if free < self.limit:
            of = self.limit / 1e9, self.folder, free / 1e9
            log.warning("data.cache_gb=%.4g is more than the disk of %s has room for: %.4g GB", *of)

    def open(self, url: str) -> Any:
        """As `open_url`, from the file where there is one. What a command gives is not kept: how long it should be, and
        so whether it is whole, is not known."""
        return open_url(url) if url.startswith("pipe:") else self._kept(url) or _Download(self, url)

    def begin(self, url: str, about: About) -> BinaryIO | None:
        """A locked file for a shard; None where there is no room, or another process has begun it."""
        head = json.dumps({"url": unsigned(url), **about._asdict()}).encode() + b"\n"
        if not about.size or len(head) > HEAD:
            return None
        part = self.path(url).with_suffix(PART)
        with self._alone():
            if part.exists() and _is_locked(part):
                return None
            if not self._make_room(HEAD + about.size):
                self._tell(1, f"the shards of this run fill its {self.limit / 1e9:.4g} GB: others are not kept")
                return None
            file = part.open("xb", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(HEAD + about.size)
        file.write(head.ljust(HEAD))
        return file

    def path(self, url: str) -> Path:
        return self.folder / hashlib.sha256(unsigned(url).encode()).hexdigest()

    def failed(self, error: OSError) -> None:
        self._tell(0, f"{error.strerror or error}: shards are read without being kept")

    def _tell(self, which: int, what: str) -> None:
        if not self._told[which]:
            self._told[which] = 1
            log.warning("data.cache=%s: %s (told once)", self.folder, what)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process makes or takes room meanwhile."""
        with (self.folder / ".lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _files(self) -> list[tuple[int, int, str]]:
        """(when it was used, size, name) of each; what killed processes have left is removed."""
        files: list[tuple[int, int, str]] = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # renamed or removed just now
                if not _NAME.fullmatch(entry.name):
                    continue
                if entry.name.endswith(PART) and not _is_locked(path := Path(entry.path)):
                    path.unlink()
                    continue
                stat = entry.stat()
                files.append((stat.st_atime_ns, stat.st_size, entry.name))
        return files

    def _make_room(self, size: int) -> bool:
        """Whether there is room for so many bytes; removes files for it, the one that was used longest ago first.

        Those that were used since this run began stay. All shards come once a pass: a file that made room for the next
        would be gone right before it is needed, and of data twice the limit a seventh would be found, not a half.
        """
        files = self._files()
        over = sum(size for _, size, _ in files) + size - self.limit
        idle = [file for file in files if file[0] < self._begun and not file[2].endswith(PART)] if over > 0 else []
        if over > sum(size for _, size, _ in idle):
            return False
        for _, size, name in sorted(idle):
            if over > 0:
                (self.folder / name).unlink(missing_ok=True)  # who reads it, reads on
                over -= size
        return True

    def _kept(self, url: str) -> _Kept | None:
        path = self.path(url)
        try:
            with contextlib.ExitStack() as stack:
                file = stack.enter_context(path.open("rb", buffering=0))
                if self._is_good(url, file):
                    stack.pop_all()
                    return _Kept(path, file)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.failed(error)
        return None

    def _is_good(self, url: str, file: BinaryIO) -> bool:
        """Whether it is whole, and of the version that is there now: that is asked once a run."""
        shard, stat, now = unsigned(url), os.fstat(file.fileno()), time.time_ns()
        about = _about(file.read(HEAD))
        if about is None or about.size is None or stat.st_size != HEAD + about.size:
            log.warning("shard %s: its file in data.cache=%s is damaged: read anew", shard, self.folder)
            return False
        asked = stat.st_mtime_ns
        if asked < self._begun:
            try:
                there = look(url)
                if about.differs(there):
                    log.warning("shard %s has changed (%s, and now %s): read anew", shard, about, there)
                    return False
            except FileNotFoundError:
                return False
            except Exception as error:  # each protocol has errors of its own
                what = f"{type(error).__name__}: {error}"
                log.warning("shard %s: cannot ask whether it has changed (%s): taken from data.cache", shard, what)
            asked = now
        os.utime(file.fileno(), ns=(now, asked))
        return True


class _Kept:
    """A shard from the disk. Where it turns out to be damaged, it is read from afar the next time."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file

    def __enter__(self) -> BinaryIO:
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        self._file.close()
        if kind is not None and issubclass(kind, Exception):
            self._path.unlink(missing_ok=True)


class _Download:
    """A shard from afar, which goes to its reader and to a file. The file stays when all was read without a fault."""

    def __init__(self, cache: Cache, url: str) -> None:
        self._cache, self._url = cache, url
        self._remote = RemoteFile(url)
        self._path = cache.path(url)
        self._part: BinaryIO | None = None
        self._at = 0

    def __enter__(self) -> _Download:
        return self

    def read(self, size: int) -> bytes:
        data = self._remote.read(size)
        try:
            if self._at == 0 and self._remote.about is not None:
                self._part = self._cache.begin(self._url, self._remote.about)
            rest = memoryview(data if self._part else b"")
            while self._part and rest:
                rest = rest[self._part.write(rest) :]
        except OSError as error:
            self._cache.failed(error)
            self._drop()
        self._at += len(data)
        return data

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._remote.__exit__()
        try:
            about = self._remote.about
            if self._part and about and kind is None and self._at == about.size:
                os.fsync(self._part.fileno())  # the name must not outlive the bytes where the power fails
                now = time.time_ns()
                os.utime(self._part.fileno(), ns=(now, now))
                self._path.with_suffix(PART).replace(self._path)
                self._part.close()
                self._part = None  # the other name is free, and may be another process's by now
        except OSError as error:
            self._cache.failed(error)
        self._drop()

    def _drop(self) -> None:
        if self._part is not None:
            with contextlib.suppress(OSError):
                self._path.with_suffix(PART).unlink(missing_ok=True)
            self._part.close()
        self._part = None


def _is_locked(part: Path) -> bool:
    with part.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _about(head: bytes) -> About | None:
    try:
        record = json.loads(head.partition(b"\n")[0])
        return About(record["size"], record["version"])
    except (ValueError, KeyError, TypeError):
        return None
