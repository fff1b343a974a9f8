"""Members of archives, against tarfile as an independent reader."""

from __future__ import annotations

import gzip
import io
import tarfile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipq.data import tar
from tests.helpers import colour_samples, write_shard

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
names = st.text("abc/.äß_", min_size=1, max_size=130).filter(lambda n: n.strip("/.") != "")
archived = st.lists(st.tuples(names, st.binary(max_size=1200)), max_size=6)


def archive(files: list[tuple[str, bytes]], kind: str = "gnu", *, mtime: float = 0, links: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as out:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime  # pyright: ignore
            out.addfile(info, io.BytesIO(content))
            if links:
                for number, type_ in enumerate((tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.LNKTYPE)):
                    other = tarfile.TarInfo(f"other{number}")
                    other.type, other.linkname = type_, name[:90]
                    out.addfile(other)
    return buffer.getvalue()


Read = tuple[list[tuple[str, bytes]], list[tar.Damage], str]
"""Members, damage that was told, and the error that ended it."""


def read(data: bytes) -> Read:
    found, told, error = [], [], ""
    try:
        for member in tar.members("x.tar", io.BytesIO(data), told.append):
            found.append((member["fname"], member["data"]))
    except Exception as e:
        error = f"{type(e).__name__}: {e}"
    return found, told, error


def by_tarfile_alone(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Read:
    with monkeypatch.context() as patch:
        patch.setattr(tar, "_size", lambda header: None)
        return read(data)


@settings(max_examples=150, deadline=None)
@given(archived, st.sampled_from(sorted(FORMATS)), st.sampled_from([0, 1.5]), st.booleans(), st.booleans())
def test_any_archive_is_read_as_tarfile_reads_it(
    files: list[tuple[str, bytes]], kind: str, mtime: float, links: bool, packed: bool
) -> None:
    try:
        data = archive(files, kind, mtime=int(mtime) if kind == "ustar" else mtime, links=links)
    except ValueError:
        return  # a name that ustar cannot hold
    with tarfile.open(fileobj=io.BytesIO(data)) as reader:
        expected = [(m.name, reader.extractfile(m).read()) for m in reader if m.isreg()]  # pyright: ignore
    found, told, error = read(gzip.compress(data) if packed else data)
    assert found == [(name, content) for name, content in expected if not tar.META.match(name)]
    assert (told, error) == ([], "")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_told(data: st.DataObject) -> None:
    """Bytes changed in headers, or the end cut off: what comes is what was there, and never silently less."""
    files = [(f"{n:03d}.txt", bytes([n]) * size) for n, size in enumerate((5, 700, 512, 0, 1024))]
    whole = archive(files)
    headers = [0, 1024, 2560, 3584, 4096]
    spoiled = bytearray(whole)
    if data.draw(st.booleans(), label="cut"):
        end = data.draw(st.integers(0, 5632), label="end")
        del spoiled[end:]
    else:
        at = data.draw(st.sampled_from(headers), label="header") + data.draw(st.integers(0, 511), label="byte")
        spoiled[at] ^= data.draw(st.integers(1, 255), label="change")
    found, told, error = read(bytes(spoiled))
    with pytest.MonkeyPatch.context() as patch:
        expected, also_told, also_error = by_tarfile_alone(bytes(spoiled), patch)
    assert found == expected or (found[:-1] == expected and error), "one more only where its padding is cut"
    assert bool(told or error) == bool(also_told or also_error)
    if found != files:
        assert told or error


def test_archives_as_webdataset_writes_them_take_the_short_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Its times are to the microsecond, which takes a header more for each member."""
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "x.tar")) as writer:  # pyright: ignore
        for n in range(20):
            writer.write({"__key__": f"{n:09d}", "jpg": bytes(n), "txt": f"no {n}", "json": {"n": n}})
    calls = []
    monkeypatch.setattr(tar, "_by_tarfile", lambda *args: calls.append(args[1].read()) or iter(()))
    for path in (tmp_path / "x.tar", write_shard(tmp_path / "y.tar", colour_samples(4))):
        found, _, _ = read(path.read_bytes())
        assert len(found) == (60 if path.name == "x.tar" else 16)
        assert not calls.pop().strip(b"\0"), "nothing but the end mark"


def test_large_members_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [("0.jpg", bytes(1000)), ("1.jpg", bytes(5000)), ("1.txt", b"a"), ("2.jpg", bytes(6000)), ("2.txt", b"b")]
    monkeypatch.setattr(tar, "MAX_MEMBER", 4000)
    long = [(f"{'long' * 40}.txt", b"x"), *files]
    for data in (archive(files), gzip.compress(archive(files)), archive(files, "pax", mtime=0.5), archive(long, "gnu")):
        found, told, _ = read(data)
        found = [row for row in found if not row[0].startswith("long")]
        assert [name for name, _ in found] == ["0.jpg", "1.txt", "2.txt"]
        sentences = [f"{n}.jpg is of {size:,} bytes: passed over" for n, size in ((1, 5000), (2, 6000))]
        assert told == [("x.tar", "large member", sentence) for sentence in sentences]
    monkeypatch.setattr(tar, "MAX_PASSED_OVER", 10_000)
    found, _, error = read(archive(files))
    assert len(found) == 2
    assert "2.jpg is of 6,000 bytes, and others were too large before" in error


def test_memory_is_that_of_a_member(tmp_path: Any) -> None:
    """1 GiB of zeros in some MB of gzip, unpacked and passed over."""
    import tracemalloc

    header = tarfile.TarInfo("0.jpg")
    header.size = 1 << 30
    path = tmp_path / "x.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(header.tobuf())
        for _ in range(64):
            out.write(bytes(1 << 24))
        out.write(archive([("1.txt", b"a")]))
    tracemalloc.start()
    with path.open("rb") as stream:
        found = [m["fname"] for m in tar.members("x.tar.gz", stream, lambda _: None)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == ["1.txt"]
    assert peak < 32 << 20
