"""What `clipq-data make` packs: class folders, tables of files and captions, other shards."""

from __future__ import annotations

import contextlib
import gzip
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

from clipq.data.evalset import IMAGE_SUFFIXES, ImageFolder
from clipq.data.parallel import over
from clipq.data.shards import grouped
from clipq.data.table import Table
from clipq.data.tar import BLOCK, MAX_MEMBER, META, NO_END, READ_AHEAD, StrictHeader

MOST_UNPACKED = 50
"""Times its size that an archive may unpack to: a few MB of gzip can hold gigabytes of zeros."""


class Piece(NamedTuple):
    """Bytes of a file: all of an image file, or a member of an archive."""

    path: str
    offset: int = 0
    size: int | None = None
    """Bytes; None for all."""


Record = dict[str, Piece | bytes]
"""Member extension -> its bytes or where they are; an image file gets its extension from its content."""


class Source(Protocol):
    """Samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Record: ...


@dataclass(frozen=True)
class ClassFolder:
    """A folder with one sub-folder for each class."""

    files: list[tuple[str, int]]
    """Path and class of each image."""
    names: Sequence[str]
    templates: Sequence[str]
    """Captions, with `{}` for the class name; of several, one is chosen at random for each image."""
    seed: int = 0
    others: Counter[str] = field(default_factory=Counter)
    """Files that are no images by their names, or lie beside the class folders, by the ends of their names."""

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int, /) -> Record:
        path, label = self.files[number]
        template = Random(f"{self.seed} {number}").choice(self.templates)
        caption = template.replace("{}", self.names[label])
        return {"image": Piece(path), "cls": str(label).encode(), "txt": caption.encode()}


def class_folder(folder: Path, names: Sequence[str] | None, templates: Sequence[str], seed: int = 0) -> ClassFolder:
    """The images of a folder of class folders, classes in the order of the folders' names.

    Args:
        names: of the classes; None for the names of the folders, with spaces for their underscores.

    Raises:
        FileNotFoundError: no sub-folders, or no images in one of them.
        ValueError: another number of names.
    """
    classes = ImageFolder(str(folder)).classes()
    if names is None:
        names = [c.name.replace("_", " ") for c in classes]
    if len(names) != len(classes):
        raise ValueError(f"{folder} has {len(classes)} class folders, but there are {len(names)} class names")
    files: list[tuple[str, int]] = []
    others = Counter(p.suffix.lower() for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for label, one in enumerate(classes):
        inside = [p for p in one.rglob("*") if p.is_file() and not p.name.startswith(".")]
        found = sorted(p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES)
        others.update(p.suffix.lower() for p in inside if p.suffix.lower() not in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{one}: a class folder without images ({', '.join(IMAGE_SUFFIXES)})")
        files += [(str(path.absolute()), label) for path in found]
    return ClassFolder(files, names, templates, seed, others)


@dataclass(frozen=True)
class TableRows:
    """Image files and captions."""

    table: Table

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int, /) -> Record:
        path, caption = self.table[number]
        return {"image": Piece(str(self.table.folder / path)), "txt": caption.strip().encode("utf-8", "replace")}


@dataclass(frozen=True)
class Shards:
    """Samples of shards, by where their members are."""

    records: list[Record]
    damage: list[str]
    """A sentence for each shard that cannot be read to its end."""

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int, /) -> Record:
        return self.records[number]


def read_shards(shards: list[str], work: Path, *, workers: int = 1) -> Shards:
    """All samples of some shards, in order; what is packed with gzip is unpacked into the folder `work` first.

    Of a damaged shard these are the samples that `read_shard` gives. Takes about a kB of memory for each sample.
    """
    tasks = [(shard, str(work / f"{number:05d}.tar")) for number, shard in enumerate(shards)]
    with contextlib.closing(over(_places, tasks, workers=workers)) as results:
        found = {shard: places for (shard, _), places in results}
    records = [record for shard in shards for record in found[shard][0]]
    return Shards(records, [f"{shard}: {found[shard][1]}" for shard in shards if found[shard][1]])


def _places(task: tuple[str, str]) -> tuple[list[Record], str]:
    """Samples of a shard, and what is wrong with it, if anything is."""
    shard, plain = task
    found: list[Record] = []
    faults: list[str] = []
    try:
        path = _plain(Path(shard), Path(plain), faults)
        for sample in grouped(_members(str(path.absolute()), faults)):
            found.append({name: piece for name, piece in sample.items() if not name.startswith("__")})
    except Exception as error:  # tarfile raises errors of many kinds on damaged files
        faults.append(f"{type(error).__name__}: {error}; {len(found)} samples were found before")
    return found, "; ".join(faults)


def _members(path: str, faults: list[str]) -> Iterator[dict[str, Any]]:
    """As `tar.members`, with places for bytes. Only headers are read."""
    archive: Any
    size = Path(path).stat().st_size
    with tarfile.open(path, "r:", tarinfo=StrictHeader) as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # it would keep every header
            if info.issparse():
                raise tarfile.ReadError(f"{info.name} is a sparse file, which can unpack to any size")
            if info.offset_data + info.size > size:
                raise tarfile.ReadError("unexpected end of data")
            if info.size > MAX_MEMBER:
                faults.append(f"{info.name} is of {info.size:,} bytes: passed over")
            elif info.isreg() and not META.match(info.name):
                yield {"fname": info.name, "data": Piece(path, info.offset_data, info.size), "__url__": path}
        stream = archive.fileobj
        stream.seek(archive.offset)
        rest = stream.read(BLOCK)
        if not rest:
            faults.append(NO_END)
        while rest:
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is an end mark, but the archive goes on after it")
            rest = stream.read(READ_AHEAD)


def _plain(shard: Path, plain: Path, faults: list[str]) -> Path:
    """A tar that can be read at any place: the shard, or what comes out of its gzip as far as that goes."""
    with shard.open("rb") as stream:
        if stream.read(2) != b"\x1f\x8b":
            return shard
    plain.parent.mkdir(parents=True, exist_ok=True)
    most = MOST_UNPACKED * max(shard.stat().st_size, 1 << 20)
    with gzip.open(shard) as packed, plain.open("wb") as out:
        try:
            while data := packed.read1(READ_AHEAD):  # read gives nothing of what comes before a fault
                out.write(data)
                if out.tell() > most:
                    raise EOFError(f"it unpacks to more than {most:,} bytes, {MOST_UNPACKED} times its size")
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
    return plain
