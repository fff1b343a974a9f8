"""`clipq-data make`: from each kind of source, and after an interruption."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import clipq.data.pack as packing
from clipq.data import pack_sources
from clipq.data.index import INDEX, read_counts
from clipq.data.pack_sources import read_shards
from clipq.data.shards import Damage, read_shard
from tests.data_command import files_of, image_of, run, samples_of
from tests.helpers import COLOURS, encode, picture


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of class folders: 37 images, all different."""
    for number in range(37):
        colour = list(COLOURS)[number % 4]
        path = tmp_path / "photos" / f"dark_{colour}" / f"{number:03d}.{('png', 'jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(colour, number), ("PNG", "JPEG")[number % 2]))
    return tmp_path / "photos"


def test_class_folder_becomes_shards(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    templates = ("a {}.", "one {c}.")
    out = tmp_path / "out"
    assert run("make", photos, out, "--per-shard", 10, "--template", templates[0], "--template", templates[1]) == 0
    assert "4 shards with 37 samples" in capsys.readouterr().out
    samples = samples_of(out)
    files = {p.read_bytes(): p for p in photos.rglob("*.*")}
    assert Counter(image_of(s) for s in samples) == Counter(list(files))
    names = sorted(f"dark {c}" for c in COLOURS)
    for sample in samples:
        path = files[image_of(sample)]
        assert path.suffix[1:] in sample
        assert names[int(sample["cls"])] == path.parent.name.replace("_", " ")
        name = names[int(sample["cls"])]
        assert sample["txt"].decode() in (f"a {name}.", f"one {name}.")
    assert len({s["txt"].split()[0] for s in samples}) == 2
    assert (out / "classnames.txt").read_text().splitlines() == names
    shards = [str(s) for s in sorted(out.glob("*.tar"))]
    assert sorted(c or 0 for c in read_counts(shards)) == [9, 9, 9, 10]
    for shard in shards:
        assert len({s["cls"] for s in read_shard(shard)}) > 1, "classes are mixed"
    assert run("index", *shards) == 0
    assert run("verify", *shards, "--decode") == 0
    assert run("stats", *shards, "--output", tmp_path / "stats") == 0
    stats = json.loads((tmp_path / "stats" / "stats.json").read_text())
    assert (stats["samples"], stats["formats"], stats["faults"]) == (37, {"PNG": 19, "JPEG": 18}, {})
    assert stats["pixels"]["short_side"]["0.5"] == 16


def test_other_files_are_counted(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = next(photos.rglob("*.jpg"))
    for name in ("a.jfif", "b", "c.avif", "d.avif", ".hidden"):
        (image.parent / name).write_bytes(image.read_bytes())
    (photos / "cover.jpg").write_bytes(image.read_bytes())
    (image.parent / "e.png").write_bytes(b"no image")
    assert run("make", photos, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "1 shards with 38 samples" in said
    assert f"1 samples were left out (mended, they come in after {tmp_path / 'out'} is removed)" in said
    assert "4 other files were not packed (2 .avif, " in said
    assert "1 without an ending" in said


def test_names_of_classes_from_a_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = tmp_path / "names.txt"
    names.write_text("B\nG\nR\nY\n")
    assert run("make", photos, tmp_path / "out", "--classnames", names) == 0
    assert {(s["cls"], s["txt"]) for s in samples_of(tmp_path / "out")} == {
        (str(n).encode(), f"a photo of a {name}".encode()) for n, name in enumerate("BGRY")
    }
    names.write_text("B\nG\n")
    assert run("make", photos, tmp_path / "out2", "--classnames", names) == 2
    assert "has 4 class folders, but there are 2 class names" in capsys.readouterr().err


def test_seed_decides_the_order(photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("make", photos, tmp_path / name, "--per-shard", 10, "--seed", seed, workers=1 + (name == "b")) == 0
    a, b, c = ([image_of(s) for s in samples_of(tmp_path / name)] for name in "abc")
    assert a == b != c
    assert sorted(a) == sorted(c)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_interrupted_and_restarted_gives_the_same_bytes(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    options = ("--per-shard", 5)
    assert run("make", photos, whole, *options) == 0
    original, reads = packing._read, []

    def interrupted(record):  # in the midst of the third shard
        reads.append(record)
        if len(reads) == 13:
            raise KeyboardInterrupt
        return original(record)

    monkeypatch.setattr(packing, "_read", interrupted)
    assert run("make", photos, out, *options) == 130
    assert {p.name for p in out.iterdir()} == {"00000.tar", "00001.tar", INDEX, packing.SETTINGS}
    (out / INDEX).unlink()  # as if killed before it was written
    (out / ".00002.tar.1.part").write_bytes(b"half")  # and with no time to tidy up
    reads[:] = [None] * 13
    assert run("make", photos, out, *options) == 0
    assert len(reads) - 13 == 37 - 4 - 5, "finished shards are not made again"
    assert files_of(out) == files_of(whole)
    reads.clear()
    assert run("make", photos, out, *options) == 0
    assert not reads


def test_other_settings_need_another_folder(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert run("make", photos, out) == 0
    before = files_of(out)
    for changed in (("--seed", 1), ("--per-shard", 7), ("--template", "one {}")):
        assert run("make", photos, out, *changed) == 2
        assert "holds shards of another source or other settings" in capsys.readouterr().err
    (photos / "dark_red" / "new.png").write_bytes(encode(picture("red", 99)))
    assert run("make", photos, out) == 2
    assert files_of(out) == before
    (out / packing.SETTINGS).unlink()
    assert run("make", photos, out) == 2
    assert "not made by clipq-data make" in capsys.readouterr().err


@pytest.mark.parametrize("tabs", [False, True])
def test_table_becomes_shards(tabs: bool, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    paths = sorted(photos.rglob("*.*"))
    rows = [(str(p.relative_to(tmp_path)), f'a "{p.stem}",\nso to say') for p in paths]
    rows += [("photos/none.jpg", "x"), (rows[0][0], " "), ("t.csv", "not an image"), ("", "no path")]
    with (tmp_path / "t.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t" if tabs else ",").writerows(
            [("n", "image", "text"), *((1, *r) for r in rows)]
        )
    columns = ("--image-column", "image", "--caption-column", "text")
    assert run("make", "t.csv", "out", "--per-shard", 20, *columns) == 0
    told = capsys.readouterr()
    assert "3 shards with 37 samples are in out; 4 samples were left out" in told.out
    for text in ("none.jpg: No such file", "its caption is empty", "t.csv: not an image of a known format"):
        assert text in told.err
    got = {(image_of(s), s["txt"].decode()) for s in samples_of(Path("out"))}
    assert got == {(p.read_bytes(), caption) for p, (_, caption) in zip(paths, rows, strict=False)}
    assert run("make", "t.csv", "out", "--per-shard", 20, *columns) == 0
    assert "37 samples are in out; 4 samples were left out" in capsys.readouterr().out


def test_formats_of_image_files(tmp_path: Path) -> None:
    """JPEG, PNG and WebP stay as they are, under the name of what they are; others become PNG."""
    (tmp_path / "p" / "c").mkdir(parents=True)
    image = picture("blue", 0)
    for name, kind in (("a.png", "JPEG"), ("b.JPEG", "PNG"), ("c.webp", "WEBP"), ("d.bmp", "BMP")):
        (tmp_path / "p" / "c" / name).write_bytes(encode(image, kind))
    assert run("make", "p", "out") == 0
    samples = samples_of(Path("out"))
    assert sorted(next(iter(s.keys() - {"__key__", "__url__", "cls", "txt"})) for s in samples) == [
        *("jpg", "png", "png", "webp")
    ]
    for data in (s["png"] for s in samples if "png" in s):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(image))


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("filepath,title\n" + "no.jpg,x\n" * 30)
    assert run("make", "t.csv", "out", "--per-shard", 5) == 1
    said = capsys.readouterr().err
    assert "none of 30 samples could be read" in said
    assert said.count("no.jpg") == 20
    assert not list(Path("out").glob("*.tar"))


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ("a.jpg,A dog, a cat, and a man\n", "line 3 has more fields than the first: put quotes"),
        ('a.jpg,"A dog\nb.jpg,A cat\n', "is not CSV: unexpected end of data"),
    ],
)
def test_rows_that_would_lose_their_captions(rows: str, says: str, capsys: pytest.CaptureFixture) -> None:
    Path("t.csv").write_text(f"filepath,title\nb.jpg,one\n{rows}")
    assert run("make", "t.csv", "out") == 2
    assert says in capsys.readouterr().err


def test_folders_that_are_no_classes(photos: Path, capsys: pytest.CaptureFixture) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (photos / name).mkdir()
    assert run("make", photos, "out", "--per-shard", 50) == 0
    assert {int(s["cls"]) for s in samples_of(Path("out"))} == set(range(4))
    (photos / "none").mkdir()
    assert run("make", photos, "again") == 2
    assert f"{photos / 'none'}: a class folder without images" in capsys.readouterr().err


def test_parquet_without_pyarrow(photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    Path("t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert run("make", "t.parquet", "out") == 2
    assert "pip install 'clipq[parquet]'" in capsys.readouterr().err


def test_parquet(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert run("make", "t.parquet", "out") == 2
    assert "t.parquet: not a parquet file" in capsys.readouterr().err
    paths = [str(p) for p in sorted(photos.rglob("*.*"))]
    table = pyarrow.table({"filepath": paths, "title": [f"number {n}" for n in range(len(paths))]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert run("make", "t.parquet", "out") == 0
    got = {(image_of(s), s["txt"]) for s in samples_of(Path("out"))}
    assert got == {(Path(p).read_bytes(), f"number {n}".encode()) for n, p in enumerate(paths)}


def members_of(sample: dict[str, bytes]) -> tuple[tuple[str, bytes], ...]:
    return tuple(sorted((k, v) for k, v in sample.items() if not k.startswith("__")))


@pytest.mark.parametrize("packed", [False, True])
def test_shards_are_packed_anew(packed: bool, shards: list[str], tmp_path: Path) -> None:
    before = Counter(members_of(s) for shard in shards for s in read_shard(shard))
    if packed:
        for number, shard in enumerate(shards):
            shards[number] = f"{shard}.gz"
            Path(shards[number]).write_bytes(gzip.compress(Path(shard).read_bytes()))
    out = tmp_path / "out"
    assert run("make", *shards, out, "--per-shard", 10, workers=2) == 0
    samples = samples_of(out)
    assert Counter(map(members_of, samples)) == before
    assert len({s["__key__"] for s in samples}) == 73
    assert sorted(c or 0 for c in read_counts([str(p) for p in sorted(out.glob("*.tar"))])) == [9] * 7 + [10]
    texts = [int(s["txt"].split()[1]) for s in samples]
    assert texts != sorted(texts)
    assert {p.name for p in out.iterdir() if p.suffix != ".tar"} == {INDEX, packing.SETTINGS}


def test_archives_unpack_to_what_they_may_hold(
    shards: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A few kB of gzip can hold gigabytes of zeros."""
    monkeypatch.setattr(pack_sources, "MOST_UNPACKED", 2)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(shards[0], "0.png")
        info = tarfile.TarInfo("1.png")
        info.size = 8 << 20
        archive.addfile(info, io.BytesIO(bytes(info.size)))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))
    assert run("make", shards[1], tmp_path / "x.tar.gz", tmp_path / "out") == 1
    assert "it unpacks to more than 2,097,152 bytes, 2 times its size" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_places_are_those_of_read_shard(kind: int, tmp_path: Path) -> None:
    """Whatever the headers are, and wherever the archive breaks off."""
    path, names = tmp_path / "x.tar", ["__meta__/a.json", "./0001.JPG", "./0001.txt", "README", f"{'long/' * 30}é.jpg"]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT if kind == tarfile.USTAR_FORMAT else kind) as tar:
        for number, name in enumerate([*names, "2.jpg", "2.txt", "3.jpg"]):
            info = tarfile.TarInfo(name)
            info.size, data = 700 * number, os.urandom(700 * number)
            tar.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 256), len(whole)]:
        for packed in (False, True):
            if packed:
                stream = gzip.compress(whole)
                path.write_bytes(stream[: len(stream) * size // len(whole)])
            else:
                path.write_bytes(whole[:size])
            damage: list[Damage] = []
            expected = [members_of(s) for s in read_shard(str(path), on_damage=damage.append)]
            found = read_shards([str(path)], tmp_path / "work")
            got = [
                tuple(sorted((ext, packing._member(piece)) for ext, piece in record.items()))  # pyright: ignore
                for record in found.records
            ]
            assert got[: len(expected)] == expected
            # A reader drops the sample that it is at when the fault comes; where padding is cut, that is not the last.
            assert len(got) - len(expected) in ((0, 1, 2) if packed else (0,))
            assert bool(found.damage) == any(fault.kind == "damaged" for fault in damage)


def test_damaged_shards_give_what_they_have(shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = bytearray(Path(shards[0]).read_bytes())
    Path(shards[0]).write_bytes(data[: len(data) // 2])
    expected = sum(len(list(read_shard(shard))) for shard in shards)
    assert 53 < expected < 73
    assert run("make", *shards, tmp_path / "out") == 1
    told = capsys.readouterr()
    assert f"not all samples can be read from {shards[0]}" in told.err
    assert f"{expected} samples are in" in told.out
    assert "1 of the sources are damaged" in told.out
