"""Tables: their rows wherever they are, and training on them as on shards."""

from __future__ import annotations

import csv
import itertools
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipq.build_data import find_sources
from clipq.config.data import CaptionConfig, DataConfig, FilterConfig, SourceConfig, TableConfig
from clipq.data.loader import StreamPlace, batches
from clipq.data.shards import DataError, names_digest
from clipq.data.source import Source
from clipq.data.table import Columns, Row, Table, TableShards
from tests.helpers import COLOURS, encode, picture
from tests.streams import TEXT, mixed, numbers, same, taken

NAMES = Columns("filepath", "title", ("--image", "--caption"))


def pictures(folder: Path, count: int) -> list[tuple[str, str]]:
    """Rows of drawn pictures, of which the first half are of one colour, as a table by classes has them."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(count):
        colour = list(COLOURS)[n * 2 // count]
        (folder / "in" / f"{n}.png").write_bytes(encode(picture(colour, n)))
        rows.append((f"in/{n}.png", f"{colour} {n}"))
    return rows


def write_csv(path: Path, rows: Sequence[tuple[str, ...]], **options: object) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, **options).writerows([("filepath", "title"), *rows])  # pyright: ignore
    return path


def write_parquet(path: Path, rows: Sequence[tuple[str | None, str | None]]) -> Path:
    columns = {"n": list(range(len(rows))), "title": [r[1] for r in rows], "filepath": [r[0] for r in rows]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)
    return path


def rows_of(path: Path) -> list[tuple[str, str]]:
    table = Table(path, NAMES)
    found = [tuple(table[n]) for n in random.Random(0).sample(range(len(table)), len(table))]
    assert len(table) == len(found)
    return sorted(found)  # pyright: ignore


ODD = st.text(st.sampled_from('a,"\n\r\t é\u2028\x0b\x85;#\ufeff'), max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(ODD.filter(bool), ODD), min_size=1, max_size=6), st.sampled_from(["csv", "tab", "parquet"]))
def test_rows_are_read_as_they_were_written(tmp_path: Path, rows: list[tuple[str, str]], kind: str) -> None:
    """Whatever is in them, and in any order."""
    if kind == "parquet":
        path = write_parquet(tmp_path / "t.parquet", rows)
    else:
        more = {"delimiter": "\t"} if kind == "tab" else {}
        path = write_csv(tmp_path / "t.csv", rows, quoting=csv.QUOTE_ALL, **more)
    assert rows_of(path) == sorted(rows)


def test_what_programs_write(tmp_path: Path) -> None:
    """Marks at the beginning, empty lines, lines that end otherwise or not at all, rows that end early."""
    path = tmp_path / "t.csv"
    path.write_bytes('\ufefffilepath,n,title\r\n\r\na.png,1,"two\r\n\r\nlines"\r\n\nb.png,2\n\n\nc.png,3,é'.encode())
    table = Table(path, NAMES)
    assert [table[n] for n in range(3)] == [Row("a.png", "two\r\n\r\nlines"), Row("b.png", ""), Row("c.png", "é")]
    assert len(table) == 3
    parquet = write_parquet(tmp_path / "t.parquet", [("a.png", None), (None, "b"), (None, None), ("d.png", "")])
    assert rows_of(parquet) == [("", ""), ("", "b"), ("a.png", ""), ("d.png", "")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path,title\na,b\n", r"t\.csv has no column filepath: name one of path, title with data\.table\.image"),
        ("filepath;title\na;b\n", r"name one of filepath;title with data\.table\.image"),
        ("filepath,caption\na,b\n", r"name one of filepath, caption with data\.table\.caption"),
        ("", r"name one of none with"),
        ("filepath,title\n\n\n", "the table has no rows"),
        ("filepath,title\na,b\na,b,c\n", "line 3 has more fields than the first"),
        ('filepath,title\na,"b\n', "row 1 is not CSV"),
        (b"filepath,title\na,b\na,\xff\n", "expected text in UTF-8: line 3: "),
        ("filepath,title\nhttps://x/a.jpg,b\n", "is an address, and column filepath is to name files"),
        ("filepath,title\na.png,b\n,c\n", r"none of its first rows .*: .*/a\.png: No such file.*relative to the table"),
        ("filepath,title\nt.csv, \n", r"none of its first rows .*: row 1 has no caption"),
    ],
)
def test_mistakes_are_told_before_training(content: str | bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=r"(?s)^data\.shards: .*" + says):
        find_sources(DataConfig(name="x", shards=str(tmp_path / "t.csv")))[0].check()


def test_settings(tmp_path: Path) -> None:
    first = write_csv(tmp_path / "first.csv", pictures(tmp_path, 8))
    second = tmp_path / "second.tsv"
    second.write_text("file\ttext\nin/0.png\tred 0\n")
    third = write_parquet(tmp_path / "third.parquet", pictures(tmp_path, 8))
    sources = {
        "a": SourceConfig(shards=[str(first), str(third)], weight=2.0),
        "b": SourceConfig(shards=str(tmp_path / "*.tsv"), table=TableConfig("file", "text"), passes=2),
    }
    found = find_sources(DataConfig(name="x", shards=None, sources=sources, table=TableConfig()))
    for source in found:
        source.check()
    assert [len(source.shards) for source in found] == [16, 1]
    assert len({names_digest({"a": source.shards}) for source in found}) == 2

    def refused(says: str, **config: object) -> None:
        with pytest.raises(ValueError, match=says):
            find_sources(DataConfig(name="x", **config))  # pyright: ignore

    sources["b"].table = None
    refused(
        r"data\.sources\.b: .*has no column filepath: name one of file, text with data\.table\.image",
        sources=sources,
        shards=None,
    )
    (tmp_path / "x.tar").touch()
    refused(r"data\.shards: .*first\.csv is a table, .*x\.tar is none", shards=[str(first), str(tmp_path / "x.tar")])
    refused(r"https://x/t\.csv is an address", shards="https://x/t.csv")
    refused(
        r"captions are in the column data\.table\.caption=title: leave caption\.field=json\.x at txt",
        **{"shards": str(first), "caption": CaptionConfig("json.x")},
    )


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"data\.shards: .*pip install 'clipq\[parquet\]'"):
        find_sources(DataConfig(name="x", shards=str(tmp_path / "t.parquet")))


def test_parquet_that_cannot_be_unpacked(tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "t.parquet", [("a.png", "x" * 1000)] * 4000)
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(ValueError, match=r"t\.parquet: it is unpacked into .*disk, and there: .*Set TMPDIR"):
        Table(path, NAMES)
    monkeypatch.setattr("tempfile.tempdir", None)
    pyarrow.parquet.write_table(pyarrow.table({"filepath": [[1]], "title": ["x"]}), path)
    with pytest.raises(ValueError, match=r"t\.parquet: not a parquet file with text in filepath and title"):
        Table(path, NAMES)


# --- training -----------------------------------------------------------------------------------------------------


def source(*paths: Path, **more: object) -> Source:
    tables = [TableShards(Table(path, NAMES)) for path in paths]
    return Source([name for t in tables for name in t.names], TEXT, tables=tables, **more)  # pyright: ignore


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "t.csv", pictures(tmp_path, 200))


def test_a_pass_has_every_row_once(table: Path, tmp_path: Path) -> None:
    s = mixed([source(table)], lanes=12, shuffle=1)
    (batch,) = taken(mixed([source(table)], lanes=12, batch_size=200), 1)
    assert batch["image"].shape == (200, 3, 8, 8)
    for workers in (0, 2):
        found = taken(s, 40, workers)
        assert len({key for b in found[:30] for key in b["key"]}) == 180
        counts = Counter(numbers(found))
        assert max(counts.values()) <= 2
    shards = TableShards(Table(table, NAMES))
    rows = [int(sample["txt"].split()[1]) for n in range(len(shards.names)) for _, sample in shards.read(n)]
    assert Counter(rows) == Counter(range(200))
    assert sum(abs(a - b) == 1 for a, b in itertools.pairwise(rows)) < 10, (
        "neighbours in the table are none in training"
    )
    other = TableShards(
        Table(write_parquet(tmp_path / "t.parquet", [(f"in/{n}.png", f"x {n}") for n in range(200)]), NAMES)
    )
    assert [s["path"] for n in range(67) for _, s in other.read(n)] == [str(tmp_path / f"in/{n}.png") for n in rows]


def test_captions_of_other_lengths_are_left_out(table: Path) -> None:
    config = DataConfig(name="t", shards=str(table), filter=FilterConfig(caption_length=[None, 6]))
    (source,) = find_sources(config)
    source.check()
    rows = [row.caption for row in (Table(table, NAMES)[n] for n in range(len(Table(table, NAMES))))]
    kept = sorted(int(caption.split()[1]) for caption in rows if len(caption) <= 6)
    assert 0 < len(kept) < len(rows)
    for workers in (0, 1):
        found = taken(mixed([source], lanes=1, batch_size=1, shuffle=1), len(kept), workers)
        assert sorted(numbers(found)) == kept
    (strict,) = find_sources(DataConfig(name="t", shards=str(table), filter=FilterConfig(caption_length=[90, None])))
    with pytest.raises(DataError, match=rf"leaves out all of {len(rows)} samples: caption_length {len(rows)}"):
        strict.check()


@pytest.mark.parametrize("filter", [FilterConfig(min_size=9), FilterConfig(json={"similarity": [0.3, None]})])
def test_what_cannot_be_filtered_in_a_table(filter: FilterConfig, table: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.shards: .*t\.csv is a table, of which only captions are filtered"):
        find_sources(DataConfig(name="t", shards=str(table), filter=filter))


def test_classes_are_mixed_from_the_first_batch_on(table: Path) -> None:
    """The table has them one after the other."""
    first = [n < 100 for n in numbers(taken(mixed([source(table)], lanes=12, batch_size=40), 1))]
    assert 8 < sum(first) < 32


@pytest.mark.parametrize("lanes", [6, 300])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 0), (2, 1)])
def test_resumed_training_sees_the_very_next_rows(lanes: int, before: int, after: int, table: Path) -> None:
    """For any number of processes; 300 lanes are more than there are shards."""
    options = {"batch_size": 20, "lanes": lanes, "shuffle": 8}
    whole = taken(mixed([source(table)], **options), 25)
    assert same(taken(mixed([source(table)], **options), 25, before), whole)
    for start in (1, 9, 20):
        s = mixed([source(table)], **options).starting_at(whole[start - 1]["place"])
        assert same(taken(s, 25 - start, after), whole[start:])
    assert not same(taken(mixed([source(table)], seed=1, **options), 5), whole[:5])


def test_ranks_share_the_rows_that_one_process_has(table: Path) -> None:
    whole = taken(mixed([source(table)], lanes=12, batch_size=24), 10)
    places: list[StreamPlace] = []
    for rank in range(3):
        s = mixed([source(table)], lanes=12, batch_size=8, rank=rank, world_size=3)
        found = taken(s, 10)
        places.append(found[-1]["place"])
        for one, all_ranks in zip(found, whole, strict=True):
            assert set(one["key"]) < set(all_ranks["key"])
    assert torch.equal(StreamPlace.of_all(places).lanes, whole[-1]["place"].lanes)


def test_files_that_are_missing(table: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has another in its place, and is counted and named; all others keep their places."""
    options = {"batch_size": 20, "lanes": 4}
    whole = taken(mixed([source(table)], **options), 10)
    (tmp_path / "in" / "7.png").unlink()
    (tmp_path / "in" / "150.png").write_text("<html>")
    (tmp_path / "in" / "33.png").unlink()
    (tmp_path / "in" / "33.png").mkdir()
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "in" / "90.png").unlink()
    (tmp_path / "in" / "90.png").symlink_to("pipe")
    found = taken(mixed([source(table)], **options), 10)
    assert sum(batch["lost"] for batch in found) == 4
    pairs = list(zip(numbers(whole), numbers(found), strict=True))
    assert {a for a, b in pairs if a != b} == {7, 33, 90, 150}
    for says in (
        r"in/7.png (row 8) of ",
        f"{tmp_path}/in/7.png: No such file",
        f"{tmp_path}/in/33.png: Is a directory",
        f"{tmp_path}/in/90.png: not a file",
        "in/150.png (row 151) of ",
    ):
        assert caplog.text.count(says) == 1, says
    for workers in (1, 2):
        assert same(taken(mixed([source(table)], **options), 10, workers), found)
    for path in (tmp_path / "in").glob("1*.png"):
        path.rename(path.with_suffix(".gone"))
    with pytest.raises(DataError, match=r"at last in/.*set data\.max_lost"):
        list(itertools.islice(batches(mixed([source(table)], **options), workers=2), 10))


def test_a_row_without_a_caption_counts_as_lost(tmp_path: Path) -> None:
    rows = pictures(tmp_path, 50)
    rows[3] = (rows[3][0], "  ")
    rows[9] = ("", "red 9")
    found = taken(mixed([source(write_csv(tmp_path / "t.csv", rows))], batch_size=50, lanes=1), 1)
    assert found[0]["lost"] == 2
    assert not {3, 9} & set(numbers(found))


def test_a_table_that_is_replaced_goes_on(table: Path) -> None:
    """Editors write anew under the name: what is read is what the run began with."""
    options = {"batch_size": 20, "lanes": 4}
    whole = taken(mixed([source(table)], **options), 10)
    s = mixed([source(table)], **options)
    write_csv(table.with_name("new.csv"), [("x", "y")]).rename(table)
    assert same(taken(s, 10, 1), whole)


def test_a_table_that_is_written_to_ends_the_run(table: Path) -> None:
    s = mixed([source(table)], lanes=2, batch_size=20)
    time.sleep(0.01)
    with table.open("a") as stream:
        stream.write("in/0.png,red 0\n")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"t\.csv was changed while it is read"):
            taken(s, 20, workers)
    more = Source(source(table).shards, TEXT)
    assert names_digest({"x": more.shards}) != names_digest({"x": s.sources[0].shards}), "a resumed run says so too"


def test_processes_read_their_own_rows_at_the_same_time(table: Path) -> None:
    """They share the open file: a place in it that one sets must be of no matter to others."""
    opened = Table(table, NAMES)
    expected = [opened[n] for n in range(200)]
    wrong: list[int] = []

    def look(seed: int) -> None:
        for n in random.Random(seed).choices(range(200), k=2000):
            if opened[n] != expected[n]:
                wrong.append(n)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_memory_is_bounded_and_shared(tmp_path: Path) -> None:
    """100 MB of rows: a few MB here, and next to nothing in each loader process."""
    path = tmp_path / "t.csv"
    with path.open("w") as stream:
        stream.write("filepath,title\n")
        for n in range(100_000):
            stream.write(f"{n}.png,{'x' * 1000}\n")
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        before = own_memory()
        shards = TableShards(Table(tmp_path / name, NAMES))
        assert own_memory() - before < 60 << 20
        child = os.fork()
        if not child:
            before = own_memory()
            for n in range(20):
                assert len(list(shards.read(n))) == 1000
            os._exit(own_memory() - before > 20 << 20)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def own_memory() -> int:
    """Bytes that no other process has."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) << 10 for name in ("Private_Clean", "Private_Dirty"))
