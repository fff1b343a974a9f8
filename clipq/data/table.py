"""Tables of image files and captions (CSV, TSV, parquet): rows by number, and as shards to train on.

A table is gone through once, for mistakes and for where its rows begin; a row is read from the file when it is needed.
So 8 bytes a row are held, 12 for training, in arrays that forked processes share.
"""

from __future__ import annotations

import csv
import os
import re
import stat
import sys
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from clipq.data.shards import DataError, Sample
from clipq.data.tar import MAX_MEMBER

SHARD = 1000
"""Rows of a shard at most."""
SHARDS = 96
"""Shards of a table, where it has so many rows: as many as are read side by side."""


def is_table(name: str) -> bool:
    return re.search(r"\.(csv|tsv|parquet)$", name, re.IGNORECASE) is not None


class Columns(NamedTuple):
    """What a table's columns are called, and the options that say so."""

    image: str
    caption: str
    options: tuple[str, str]


class Row(NamedTuple):
    path: str
    """As the table has it."""
    caption: str


class Table:
    """The rows of a CSV, TSV (the delimiter is a tab where the first line has one) or parquet file.

    Raises:
        ValueError: no such columns, no rows, no file of this kind, or pyarrow is needed and not installed.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, columns: Columns) -> None:
        self.path = path
        self.folder = path.parent.absolute()
        """Paths are relative to it."""
        self.columns = columns
        self._file = _as_csv(path, columns) if path.suffix.lower() == ".parquet" else path.open("rb")
        self._starts = np.frombuffer(self._scan(), np.int64)
        self._state = self._state_now()
        if not len(self):
            raise ValueError(f"{path}: the table has no rows")
        if "://" in (first := self[0].path):
            raise ValueError(
                f"{path}: {first} is an address, and column {columns.image} is to name files: download them first, "
                "for instance with img2dataset, which writes shards itself"
            )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int, /) -> Row:
        start, end = self._starts[number : number + 2].tolist()
        data = os.pread(self._file.fileno(), end - start, start)  # forked processes share where `read` is
        return self._row(next(csv.reader([data.decode()], delimiter=self._delimiter, strict=True)))

    def check_unchanged(self) -> None:
        """Raises:
        DataError: another program has written to the file, so that rows are no more where they were.
        """
        if self._state_now() != self._state:
            raise DataError(f"{self.path} was changed while it is read: put it back, or start again with another name=")

    def _state_now(self) -> tuple[int, int]:
        now = os.fstat(self._file.fileno())
        return now.st_size, now.st_mtime_ns

    def _row(self, fields: list[str]) -> Row:
        path, caption = (fields[n] if n < len(fields) else "" for n in self._numbers)
        return Row(path, caption)

    def _scan(self) -> array[int]:
        """Where each row begins, and the last ends. Sees that all of it is CSV with the columns."""
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses long captions
        self._delimiter = "\t" if b"\t" in self._file.readline() else ","
        self._file.seek(0)
        starts, at = array("q"), 0

        def lines() -> Iterator[str]:
            nonlocal at
            encoding = "utf-8-sig"
            for line in self._file:
                at += len(line)
                yield line.decode(encoding)
                encoding = "utf-8"

        rows = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        try:
            names = next(rows, [])
            self._numbers = _numbers(self.path, self.columns, names)
            start, width = at, len(names)
            for row in rows:
                if row:  # not an empty line
                    starts.append(start)
                if len(row) > width:
                    raise ValueError(
                        f"{self.path}: line {rows.line_num} has more fields than the first: put quotes around captions "
                        "with a delimiter in them"
                    )
                start = at  # after the lines of the row, of which quoted fields may have several
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: expected text in UTF-8: line {rows.line_num + 1}: {error}") from error
        except csv.Error as error:
            raise ValueError(f"{self.path}: row {len(starts) + 1} is not CSV: {error}") from error
        starts.append(at)
        return starts


def _numbers(path: Path, columns: Columns, there: Sequence[str]) -> tuple[int, int]:
    for name, option in zip(columns[:2], columns.options, strict=True):
        if name not in there:
            raise ValueError(f"{path} has no column {name}: name one of {', '.join(there) or 'none'} with {option}")
    return there.index(columns.image), there.index(columns.caption)


def _as_csv(path: Path, columns: Columns) -> IO[bytes]:
    """The two columns of a parquet file as a CSV file without a name, which ends with the processes that have it: rows
    of parquet cannot be read one by one, and in memory each rank would have them all."""
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.csv  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet takes pyarrow: pip install 'clipq[parquet]'") from error
    names = list(columns[:2])
    schema = pyarrow.schema([(name, pyarrow.large_string()) for name in names])
    out = tempfile.TemporaryFile()  # noqa: SIM115 (the table's)
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False)  # it would hold all of the file
        with file, pyarrow.csv.CSVWriter(out, schema) as writer:
            _numbers(path, columns, file.schema_arrow.names)
            batch: Any
            for batch in file.iter_batches(batch_size=10_000, columns=names):
                writer.write_batch(batch.select(names).cast(schema))
        out.flush()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a parquet file with text in {' and '.join(names)}: {error}") from error
    except OSError as error:
        raise ValueError(
            f"{path}: it is unpacked into {tempfile.gettempdir()}, and there: {error.strerror or error}. Set TMPDIR to "
            "a folder on a disk with room"
        ) from error
    return out


class TableShards:
    """A table as shards of rows that come from anywhere in it, in an order that its number of rows decides: rows that
    stand together, as those of one image or class, would else be in one batch."""

    def __init__(self, table: Table) -> None:
        self.table = table
        rows = len(table)
        self._order = np.random.default_rng(rows).permutation(np.arange(rows, dtype=np.uint32))
        self._size = min(SHARD, -(-rows // SHARDS))
        count = -(-rows // self._size)
        self.names = [f"{table.path}#{n} of {count}, {rows} rows" for n in range(count)]

    def check(self) -> None:
        """Looks at the first rows.

        Raises:
            DataError: none of 100 names an image file and has a caption.
        """
        why = ""
        for number in range(min(100, len(self.table))):
            sample = self._sample(number)
            try:
                read_image(sample)
                if sample["txt"].strip():
                    return
                why = why or f"row {number + 1} has no caption"
            except ValueError as error:
                why = why or str(error)
        raise DataError(
            f"{self.table.path}: none of its first rows names an image file and has a caption: {why}. Paths are "
            f"relative to the table's folder; {' and '.join(self.table.columns.options)} name the columns"
        )

    def read(self, shard: int, *, part: int = 0, parts: int = 1, first: int = 0) -> Iterator[tuple[int, Sample]]:
        """(index in the shard, sample) of the rows whose index mod `parts` is `part` and no less than `first`.

        A sample has the path of its image, to be read when it is needed: those that wait to be shuffled take no memory,
        and what a resumed run passes over is not read.

        Raises:
            DataError: the table cannot be read any more.
        """
        rows = self._order[shard * self._size : (shard + 1) * self._size].tolist()
        self.table.check_unchanged()
        for index in range(first + (part - first) % parts, len(rows), parts):
            try:
                sample = self._sample(rows[index])
            except (OSError, ValueError, StopIteration, csv.Error) as error:
                self.table.check_unchanged()
                raise DataError(f"{self.table.path}: row {rows[index] + 1} cannot be read: {error}") from error
            yield index, sample

    def _sample(self, number: int) -> Sample:
        row = self.table[number]
        return {
            "__key__": f"{row.path} (row {number + 1})",
            "__url__": str(self.table.path),
            "path": os.path.join(self.table.folder, row.path) if row.path else "",  # noqa: PTH118 (Path is slower)
            "txt": row.caption.encode(),
        }


def read_tables(tables: list[TableShards], shard: int, **which: int) -> Iterator[tuple[int, Sample]]:
    """As `TableShards.read`, of a shard by its number in all of them."""
    for table in tables:
        if shard < len(table.names):
            return table.read(shard, **which)
        shard -= len(table.names)
    raise IndexError


def read_image(sample: Sample) -> bytes:
    """The image file of a row.

    Raises:
        ValueError: it cannot be read.
    """
    path = sample["path"]
    if not path:
        raise ValueError("there is no path")
    try:
        # without waiting: a named pipe may never be written to
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:  # noqa: PTH123 (Path is slower)
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise ValueError(f"{path}: not a file")
            if found.st_size > MAX_MEMBER:
                raise ValueError(f"{path}: {found.st_size:,} bytes are more than the {MAX_MEMBER:,} accepted")
            return file.read()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
