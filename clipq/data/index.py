"""How many samples shards hold: `clipq_index.json` beside them, and what other tools leave there."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clipq.data.parallel import over
from clipq.data.remote import is_url
from clipq.data.shards import BrokenShardError, Damage, read_shard

log = logging.getLogger(__name__)

INDEX = "clipq_index.json"
VERSION = 1
SAVE_SECONDS = 20
_SHAPE = '{"version": 1, "shards": {"00000.tar": {"samples": 1000, "bytes": 12345, "sha256": "..."}}}'


class Entry(NamedTuple):
    """What an index says of a shard."""

    samples: int
    bytes: int
    sha256: str


def read_counts(shards: list[str]) -> list[int | None]:
    """How many samples each shard holds, as a manifest in its folder says; None where none does, and for addresses.

    The first counts that names the shard: `clipq_index.json`, `sizes.json` (webdataset's), `NAME_stats.json` (one for
    each shard, img2dataset's). Shards are not looked at: `clipq-data verify` tells whether a manifest is right.

    Raises:
        ValueError: a manifest is malformed; the message names the file and what was expected.
    """
    index, sizes = functools.cache(read_index), functools.cache(_read_sizes)
    counts: list[int | None] = []
    for shard in shards:
        if is_url(shard):
            counts.append(None)
            continue
        path = Path(shard)
        entry = index(path.parent).get(path.name)
        count = entry.samples if entry else sizes(path.parent).get(path.name)
        counts.append(_stats_count(path) if count is None else count)
    return counts


def read_index(folder: Path) -> dict[str, Entry]:
    """Shard name -> entry, from the index of a folder; empty where there is none.

    Raises:
        ValueError: as `read_counts`.
    """
    path = folder / INDEX
    record = _json(path, _SHAPE)
    if record is None:
        return {}
    if record.get("version", VERSION) != VERSION:
        raise ValueError(
            f"{path} is of version {record['version']!r}, and this clipq reads version {VERSION}: delete it and run "
            "clipq-data index, or install a newer clipq"
        )
    shards = record.get("shards")
    if not isinstance(shards, dict):
        raise _malformed(path, _SHAPE)
    return {name: _entry(path, entry) for name, entry in shards.items()}


def _entry(path: Path, entry: Any) -> Entry:
    try:
        made = Entry(*(entry[field] for field in Entry._fields))
    except (KeyError, TypeError):
        raise _malformed(path, _SHAPE) from None
    if not (_is_count(made.samples) and _is_count(made.bytes) and isinstance(made.sha256, str)):
        raise _malformed(path, _SHAPE)
    return made


def _read_sizes(folder: Path) -> dict[str, int]:
    path, shape = folder / "sizes.json", '{"00000.tar": 1000, ...}'
    record = _json(path, shape) or {}
    if not all(_is_count(count) for count in record.values()):
        raise _malformed(path, shape)
    return record


def _stats_count(shard: Path) -> int | None:
    stem = re.sub(r"\.tar(\.gz)?$", "", shard.name)
    path, shape = shard.with_name(f"{stem}_stats.json"), '{"successes": 1000, ...}, as img2dataset writes it'
    record = _json(path, shape)
    if record is None:
        return None
    if not _is_count(record.get("successes")):
        raise _malformed(path, shape)
    return record["successes"]


def _json(path: Path, shape: str) -> dict[str, Any] | None:
    """An object from a file; None where there is no such file."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise _malformed(path, shape) from None
    if not isinstance(record, dict):
        raise _malformed(path, shape)
    return record


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _malformed(path: Path, shape: str) -> ValueError:
    return ValueError(f"{path} cannot be used: expected JSON such as {shape}. Delete it or write it anew")


def measure(shard: str) -> Entry | BrokenShardError:
    """Reads a shard from its first to its last byte; a BrokenShardError where it cannot be read to its end."""
    faults: list[Damage] = []
    samples = sum(1 for _ in read_shard(shard, on_damage=faults.append))
    for fault in faults:
        if fault.kind == "damaged":
            return BrokenShardError(fault.text)
    return Entry(samples, Path(shard).stat().st_size, sha256_of(shard))


def sha256_of(shard: str) -> str:
    with Path(shard).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Indexed(NamedTuple):
    """A shard whose samples are known, or one that is damaged."""

    shard: str
    found: Entry | BrokenShardError
    read: bool
    """Whether it was read for that; False where the index had it."""


def index_shards(shards: list[str], *, workers: int = 1, again: bool = False) -> Generator[Indexed]:
    """Writes the index of each folder of the shards, and tells of each shard.

    Shards that the index has with their size in bytes are not read again, unless `again`. The files are written every
    20 s and whenever this ends, be it early. Shards that are damaged or gone are not in them.

    Raises:
        ValueError: an index that is there is malformed.
        OSError: it cannot be written.
    """
    for folder in {Path(s).parent for s in shards}:
        if not os.access(folder, os.W_OK):  # told now, not after an hour of reading
            raise PermissionError(errno.EACCES, "the index is written beside the shards: not writable", str(folder))
    indexes = Indexes()
    unread = []
    for shard in shards:
        entry = None if again else indexes.known(shard)
        if entry is None:
            unread.append(shard)
        else:
            yield Indexed(shard, entry, read=False)
    try:
        with contextlib.closing(over(measure, unread, workers=workers)) as results:
            for shard, found in results:
                indexes.add(shard, found if isinstance(found, Entry) else None)
                yield Indexed(shard, found, read=True)
    finally:
        indexes.save()


class Indexes:
    """The indexes of the folders of some shards, and what is to be added to them."""

    def __init__(self) -> None:
        self._folders = functools.cache(read_index)
        self._new: dict[Path, dict[str, Entry | None]] = {}
        self._saved = time.monotonic()

    def known(self, shard: str) -> Entry | None:
        """What the index says of a shard, unless the shard's size is another by now."""
        path = Path(shard)
        entry = self._folders(path.parent).get(path.name)
        return entry if entry and path.stat().st_size == entry.bytes else None

    def add(self, shard: str, entry: Entry | None) -> None:
        """Notes an entry, None to remove it, and writes what was noted when the last time is 20 s ago."""
        path = Path(shard)
        self._new.setdefault(path.parent, {})[path.name] = entry
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Writes the files, merged with what another process may have written since."""
        for folder, new in self._new.items():
            entries = {name: entry for name, entry in (read_index(folder) | new).items() if entry}
            gone = sorted(name for name in entries if not (folder / name).exists())
            if gone:
                log.warning("%s: %d shards are gone and taken out: %s", folder / INDEX, len(gone), ", ".join(gone[:10]))
            shards = {name: entries[name]._asdict() for name in sorted(set(entries) - set(gone))}
            record = {"version": VERSION, "shards": shards}
            write_whole(folder / INDEX, (json.dumps(record, indent=1) + "\n").encode())
        self._new.clear()
        self._saved = time.monotonic()


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file so that under its name there is either all of it or what was there before."""
    with whole_file(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name to write to, which becomes `path` when this ends well and is removed when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
