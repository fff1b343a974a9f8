"""Writes shards: samples in a random order that a seed decides, some at a time, each shard whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipq.data.check import image_header
from clipq.data.decode import decode_pil
from clipq.data.index import Entry, Indexes, measure, whole_file, write_whole
from clipq.data.pack_sources import Piece, Record, Source
from clipq.data.parallel import over

VERSION = 1
"""Raise it with every change of what is written: a run started before is not gone on with."""
SETTINGS = "clipq_make.json"
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Formats that are written as they are; others become PNG."""


class Packed(NamedTuple):
    """A shard that is finished."""

    shard: Path
    entry: Entry | None
    """None where all of its samples are left out, and it is not written."""
    left_out: list[str]
    """A sentence for each sample that could not be read just now; none for a shard that was there."""
    made: bool
    """Whether it was written or read just now; False where the index had it."""


class _Task(NamedTuple):
    shard: Path
    records: list[tuple[int, Record]]
    """Numbers and samples."""


class _NothingLeftError(Exception):
    """No sample of a shard can be read."""


def pack(source: Source, output: Path, *, per_shard: int = 1000, seed: int = 0, workers: int = 1) -> Generator[Packed]:
    """Writes `output`/00000.tar, … and their index; a shard that is there from the same source and settings stays.

    The bytes are a function of the source, `per_shard` and `seed`. Keys are new: the number of a sample in this order.

    Args:
        per_shard: samples in a shard at most; all shards have as many, give or take one.

    Raises:
        ValueError: the folder holds shards of other settings, or a shard there is damaged.
        OSError: a shard cannot be written.
    """
    order = np.random.default_rng(seed).permutation(len(source))
    count = -(-len(source) // per_shard)
    bounds = [len(source) * n // count for n in range(count + 1)]
    shards = [output / f"{n:0{max(5, len(str(count - 1)))}d}.tar" for n in range(count)]
    _take_folder(output, source, {"per_shard": per_shard, "seed": seed, "samples": len(source), "shards": count})
    indexes = Indexes()
    known = {s: indexes.known(str(s)) for s in shards if s.exists()}
    for shard, entry in known.items():
        if entry:
            yield Packed(shard, entry, [], made=False)
    tasks = (
        _Task(shard, [(n, source[order[n]]) for n in range(first, end)])
        for shard, first, end in zip(shards, bounds[:-1], bounds[1:], strict=True)
        if not known.get(shard)
    )
    try:
        with contextlib.closing(over(_make, tasks, workers=workers)) as results:
            for _, packed in results:
                indexes.add(str(packed.shard), packed.entry)
                yield packed
    finally:
        _sweep(output)  # what processes that were ended have left
        indexes.save()


def _take_folder(output: Path, source: Source, settings: dict[str, int]) -> None:
    """Makes the folder, or sees that what is in it is of the same settings."""
    digest = hashlib.sha256(json.dumps([VERSION, settings]).encode())
    for number in range(len(source)):
        digest.update(repr(source[number]).encode("utf-8", "surrogateescape"))
    record = json.dumps({"version": VERSION, **settings, "digest": digest.hexdigest()}, indent=1) + "\n"
    path = output / SETTINGS
    output.mkdir(parents=True, exist_ok=True)
    if path.exists():
        if path.read_text(encoding="utf-8") != record:
            raise ValueError(
                f"{output} holds shards of another source or other settings (see {SETTINGS} there): name another "
                "folder, or delete it"
            )
    elif any(output.glob("*.tar*")):
        raise ValueError(f"{output} holds shards that were not made by clipq-data make: name another folder")
    _sweep(output)
    write_whole(path, record.encode())


def _sweep(output: Path) -> None:
    for part in output.glob(".*.part"):
        part.unlink(missing_ok=True)


def _make(task: _Task) -> Packed:
    left_out: list[str] = []
    if not task.shard.exists():
        try:
            with whole_file(task.shard) as part:
                _write(part, task.records, left_out)
        except _NothingLeftError:
            return Packed(task.shard, None, left_out, made=True)
    entry = measure(str(task.shard))
    if not isinstance(entry, Entry):
        raise ValueError(f"{task.shard} is damaged ({entry}): delete it and start again")
    return Packed(task.shard, entry, left_out, made=True)


def _write(path: Path, records: list[tuple[int, Record]], left_out: list[str]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:  # it has no bound on names
        for number, record in records:
            try:
                members = dict(_read(record))
            except (OSError, ValueError) as error:
                left_out.append(_why(record, error))
                continue
            for extension, data in members.items():
                # The default header has no owner and no time: the same samples give the same bytes.
                header = tarfile.TarInfo(f"{number:09d}.{extension}")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
    if len(left_out) == len(records):
        raise _NothingLeftError


def _read(record: Record) -> Iterator[tuple[str, bytes]]:
    """(extension, bytes) of a sample.

    Raises:
        OSError: a file cannot be read.
        ValueError: an image file is none, the caption is empty, or an archive ends before a member does.
    """
    for extension, piece in record.items():
        if isinstance(piece, bytes):
            if extension == "txt" and not piece:
                raise ValueError("its caption is empty")
            yield extension, piece
        elif piece.size is None:
            yield _image(Path(piece.path).read_bytes())
        else:
            yield extension, _member(piece)


def _image(data: bytes) -> tuple[str, bytes]:
    extension = EXTENSIONS.get(image_header(data)[2])
    if extension:
        return extension, data
    out = io.BytesIO()
    decode_pil(data).save(out, "PNG")
    return "png", out.getvalue()


def _member(piece: Piece) -> bytes:
    with Path(piece.path).open("rb") as stream:
        stream.seek(piece.offset)
        data = stream.read(piece.size)
    if len(data) != piece.size:
        raise ValueError(f"the archive ends before its byte {piece.offset + (piece.size or 0):,}")
    return data


def _why(record: Record, error: Exception) -> str:
    piece = next(p for p in record.values() if isinstance(p, Piece))
    return f"{piece.path}: {(error.strerror if isinstance(error, OSError) else None) or error}"
