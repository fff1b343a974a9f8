"""What `clipq-data make` packs: class folders, tables of files and captions, other shards."""

from __future__ import annotations

import contextlib
import csv
import gzip
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol

from clipq.data.evalset import IMAGE_SUFFIXES, ImageFolder
from clipq.data.parallel import over
from clipq.data.shards import grouped
from clipq.data.tar import BLOCK, MAX_MEMBER, META, NO_END, READ_AHEAD, StrictHeader


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
    for label, one in enumerate(classes):
        found = sorted(p for p in one.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{one}: a class folder without images ({', '.join(IMAGE_SUFFIXES)})")
        files += [(str(path.absolute()), label) for path in found]
    return ClassFolder(files, names, templates, seed)


@dataclass(frozen=True)
class Table:
    """Image files and captions."""

    folder: Path
    """Paths are relative to it."""
    paths: Sequence[str]
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int, /) -> Record:
        path = str(self.folder.absolute() / self.paths[number])
        return {"image": Piece(path), "txt": self.captions[number].strip().encode("utf-8", "replace")}


def read_table(path: Path, image: str, caption: str) -> Table:
    """The rows of a CSV, TSV (the delimiter is a tab where the first line has one) or parquet file.

    Args:
        image: name of the column of paths, relative to the folder of the file.
        caption: name of the column of captions.

    Raises:
        ValueError: no such columns, no rows, or no file of this kind.
        ImportError: a parquet file, but pyarrow is not installed.
    """
    read = _parquet_columns if path.suffix == ".parquet" else _text_columns
    paths, captions = read(path, image, caption)
    if not paths:
        raise ValueError(f"{path}: the table has no rows")
    if "://" in paths[0]:
        raise ValueError(
            f"{path}: {paths[0]} is an address, and column {image} is to name files: download them first, "
            "for instance with img2dataset, which writes shards itself"
        )
    return Table(path.parent, paths, captions)


def _text_columns(path: Path, image: str, caption: str) -> tuple[list[str], list[str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses long captions
    paths, captions = [], []
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            rows = csv.DictReader(stream, delimiter="\t" if "\t" in first else ",", strict=True)
            _check_columns(path, [image, caption], rows.fieldnames or [])
            for row in rows:
                if None in row:
                    raise ValueError(
                        f"{path}: line {rows.line_num} has more fields than the first: put quotes around captions "
                        "with a delimiter in them"
                    )
                paths.append(row[image] or "")
                captions.append(row[caption] or "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    except csv.Error as error:
        raise ValueError(f"{path}: row {len(paths) + 1} is not CSV: {error}") from error
    return paths, captions


def _parquet_columns(path: Path, image: str, caption: str) -> tuple[list[str], list[str]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"{path}: reading parquet takes pyarrow: pip install 'clipq[parquet]'") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, [image, caption], file.schema_arrow.names)
            table: Any = file.read([image, caption])
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file: {error}") from error
    paths, captions = ([str(value or "") for value in table[name].to_pylist()] for name in (image, caption))
    return paths, captions


def _check_columns(path: Path, wanted: list[str], there: Sequence[str]) -> None:
    for name, option in zip(wanted, ("--image-column", "--caption-column"), strict=True):
        if name not in there:
            raise ValueError(f"{path} has no column {name}: name one of {', '.join(there) or 'none'} with {option}")


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
    with gzip.open(shard) as packed, plain.open("wb") as out:
        try:
            while data := packed.read1(READ_AHEAD):  # read gives nothing of what comes before a fault
                out.write(data)
        except Exception as error:
            faults.append(f"{type(error).__name__}: {error}")
    return plain
