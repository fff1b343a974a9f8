"""The members of a tar archive, read as a stream.

tarfile takes about 100 µs for a header, longer than it takes to decode a small image. Archives as webdataset and
img2dataset write them are read here; at the first header of another kind, or with any fault, tarfile takes over.
"""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, Self, cast

BLOCK = 512
READ_AHEAD = 1 << 20
MAX_MEMBER = 256 << 20
"""Bytes; a larger member is passed over: a few kB of gzip can hold gigabytes of zeros."""
MAX_PASSED_OVER = 16 << 30
"""Bytes of such members in an archive."""
NO_END = "it has no end mark: it may have been cut short"
META = re.compile(r"__[^/]*__($|/)")
"""Member names that webdataset reserves for what is no sample."""
_PLAIN_NUMBER = re.compile(rb"[0-7]+[\0 ]*")
_FILE, _PAX, _EMPTY = b"0\0", b"x", b"12345"
"""Types of members: a file, attributes of the next member, and those without content."""


class Damage(NamedTuple):
    """What is wrong with a shard."""

    shard: str
    kind: str
    """"damaged" where samples may be missing, "large member" where one is passed over, "empty"."""
    text: str


class _Stream(io.RawIOBase):
    """What was read of a stream already, and then what `read` gives, at most so many bytes at a time."""

    def __init__(self, start: bytes, read: Callable[[int], bytes]) -> None:
        self._start, self._read = start, read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start or self._read(len(buffer))
        self._start = data[len(buffer) :] if self._start else b""
        data = data[: len(buffer)]
        buffer[: len(data)] = data
        return len(data)


class StrictHeader(tarfile.TarInfo):
    """A header whose damage is an error: tarfile itself takes it for the end of the archive, without a word."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # pyright: ignore[reportAttributeAccessIssue]
            raise tarfile.ReadError(f"a header is damaged: {error}") from error


def members(shard: str, stream: Any, on_damage: Callable[[Damage], None]) -> Iterator[dict[str, Any]]:
    """{"fname", "data", "__url__"} of each file in an archive, plain or packed, but those named `__…__`.

    Args:
        shard: its name.
        stream: has `read`.
        on_damage: called where the archive may have been cut short, and for each member that is passed over.

    Raises:
        tarfile.ReadError, EOFError, OSError, zlib.error: the archive is damaged, or goes on after its end mark.
    """
    buffered = io.BufferedReader(_Stream(b"", stream.read), READ_AHEAD)
    start = buffered.peek(2)[:2]
    if not start:
        raise tarfile.ReadError("empty file")
    if start == b"\x1f\x8b":
        # read1 gives what there is before it finds the file cut short
        unpacked = gzip.GzipFile(fileobj=cast(Any, buffered))
        buffered = io.BufferedReader(_Stream(b"", unpacked.read1), READ_AHEAD)
    passed_over = 0
    attributes = b""
    while header := buffered.read(BLOCK):
        kind = header[156:157]
        size = _size(header)
        if size is None or kind not in _FILE + _PAX + _EMPTY:
            # an end mark, a long name, a fault: tarfile knows
            yield from _by_tarfile(shard, io.BufferedReader(_Stream(attributes + header, buffered.read)), on_damage)
            return
        if kind in _EMPTY:
            attributes = b""
            continue
        if size > MAX_MEMBER and kind in _FILE:
            passed_over += size
            name = _pass_over(buffered, header, size, passed_over)
            on_damage(Damage(shard, "large member", f"{name} is of {size:,} bytes: passed over"))
            attributes = b""
            continue
        padded = -(-size // BLOCK) * BLOCK
        data = buffered.read(padded)
        if len(data) < size or (kind == _PAX and not _harmless(data)):
            yield from _by_tarfile(
                shard, io.BufferedReader(_Stream(attributes + header + data, buffered.read)), on_damage
            )
            return
        if kind == _PAX:
            attributes = header + data
            continue
        attributes = b""
        name = header[: header.find(b"\0", 0, 100) if b"\0" in header[:100] else 100].decode("utf-8", "surrogateescape")
        if "__" not in name or not META.match(name):
            yield {"fname": name, "data": data[:size], "__url__": shard}
        if len(data) < padded:
            raise tarfile.ReadError(f"it ends in the padding of {name}")
    on_damage(Damage(shard, "damaged", NO_END))


def _size(header: bytes) -> int | None:
    """Size of the member that a plain header announces; None for a header of another kind, or a damaged one."""
    if len(header) < BLOCK or header[257:262] != b"ustar" or header[345]:
        return None
    size, checksum = header[124:136], header[148:156]
    if not (_PLAIN_NUMBER.fullmatch(size) and _PLAIN_NUMBER.fullmatch(checksum)):
        return None
    # the low half of Adler-32 is 1 + the sum of the bytes, modulo 65521: 20 times faster than sum()
    told = int(checksum.rstrip(b"\0 "), 8) - 8 * ord(" ") + sum(checksum)
    if (1 + told) % 65521 != zlib.adler32(header) & 0xFFFF:
        return None
    return int(size.rstrip(b"\0 "), 8)


def _harmless(attributes: bytes) -> bool:
    """Whether extended attributes change nothing that is read here, such as times to the microsecond."""
    return not any(word in attributes for word in (b" path=", b" size=", b" GNU.", b"hdrcharset"))


def _pass_over(stream: BinaryIO, header: bytes, size: int, so_far: int) -> str:
    """Its name."""
    name = header[:100].rstrip(b"\0").decode("utf-8", "replace")
    if so_far > MAX_PASSED_OVER:
        raise tarfile.ReadError(f"{name} is of {size:,} bytes, and others were too large before")
    left = -(-size // BLOCK) * BLOCK
    while left and (data := stream.read(min(left, READ_AHEAD))):
        left -= len(data)
    if left:
        raise tarfile.ReadError(f"it ends in {name}")
    return name


def _by_tarfile(shard: str, stream: Any, on_damage: Callable[[Damage], None]) -> Iterator[dict[str, Any]]:
    """As `members`, for any archive."""
    archive: Any = tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictHeader)  # noqa: SIM115 (the caller's stream)
    passed_over = 0
    while (info := archive.next()) is not None:
        archive.members = []  # it would keep every header
        if info.issparse():
            raise tarfile.ReadError(f"{info.name} is a sparse file, which can unpack to any size")
        if info.size > MAX_MEMBER:
            passed_over += info.size
            if passed_over > MAX_PASSED_OVER:
                raise tarfile.ReadError(f"{info.name} is of {info.size:,} bytes, and others were too large before")
            on_damage(Damage(shard, "large member", f"{info.name} is of {info.size:,} bytes: passed over"))
        elif info.isreg() and not META.match(info.name):
            yield {"fname": info.name, "data": archive.extractfile(info).read(), "__url__": shard}
    if archive.fileobj.tell() == archive.offset:
        on_damage(Damage(shard, "damaged", NO_END))
    while rest := archive.fileobj.read(READ_AHEAD):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("there is an end mark, but the archive goes on after it")
