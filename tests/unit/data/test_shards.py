"""Names of shards, and what is read from whole and from damaged ones."""

from __future__ import annotations

import gzip
import io
import logging
import tarfile
from pathlib import Path

import pytest

from clipq.data.decode import Captions
from clipq.data.shards import (
    Damage,
    LeftOut,
    check_members,
    expand,
    member,
    names_digest,
    read_part,
    read_shard,
    share_of_lane,
)
from tests.helpers import colour_samples, write_shard

PLAIN = ("png", "txt")


def keys(shard: str | Path) -> list[str]:
    return [s["__key__"] for s in read_shard(str(shard))]


def texts(shard: str | Path) -> list[str]:
    return [s["txt"].decode() for s in read_shard(str(shard)) if "txt" in s]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/0.tar", "a/1.tar", "a/10.tar", "b/0.tar.gz", "c[1]/x:0.tar", "c[1]/#?%20.tar"):
        write_shard(tmp_path / name, colour_samples(2))
    (tmp_path / "a" / "d.tar").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ("a/0.tar", ["a/0.tar"]),
        ("a/{0..1}.tar", ["a/0.tar", "a/1.tar"]),
        ("{a,b}/0.tar*", ["a/0.tar", "b/0.tar.gz"]),
        ("a/*.tar", ["a/0.tar", "a/1.tar", "a/10.tar"]),  # not the folder of such a name
        ("a/?.tar", ["a/0.tar", "a/1.tar"]),
        ("**/0.tar", ["a/0.tar"]),
        (["a/1.tar", "a/0.tar"], ["a/1.tar", "a/0.tar"]),  # the order that was asked for
        ("c[1]/x:0.tar", ["c[1]/x:0.tar"]),  # a name, although it looks like a glob
        ("c[[]1]/x*.tar", ["c[1]/x:0.tar"]),
        ("s3://bucket/{0..1}.tar", ["s3://bucket/0.tar", "s3://bucket/1.tar"]),
        ("pipe:cat *.tar", ["pipe:cat *.tar"]),
        ("https://host/x[1]?.tar", ["https://host/x[1]?.tar"]),
    ],
)
def test_expand(folder: Path, monkeypatch: pytest.MonkeyPatch, patterns: str | list[str], expected: list[str]) -> None:
    monkeypatch.chdir(folder)
    assert expand(patterns) == expected


def test_expand_goes_into_folders(tmp_path: Path) -> None:
    for name in ("2.tar", "a/0.tar", "a/b/1.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/**/*.tar") == [f"{tmp_path}/{name}" for name in ("2.tar", "a/0.tar", "a/b/1.tar")]


def test_expand_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert expand(["~/a/0.tar", "~/b/*"]) == [f"{folder}/a/0.tar", f"{folder}/b/0.tar.gz"]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        ("a/{0..2}.tar", r"no shard matches 'a/2.tar' \(from 'a/{0..2}.tar'\)"),
        ("no/*.tar", "no shard matches 'no/\\*.tar'$"),
        (["a/0.tar", "no.tar"], "no shard matches 'no.tar'$"),
        ("a", "a is a folder: .* a/\\*.tar"),
        ("a/", "a/ is a folder: .* a/\\*.tar"),
        (["a/0.tar", "a/*.tar"], "a/0.tar is named twice"),
        (["a/0.tar"] * 3, "a/0.tar is named 3 times"),
        ("s3://b/{0,0}.tar", "s3://b/0.tar is named twice"),
        ([], "no shards are named"),
    ],
)
def test_expand_mistakes(folder: Path, monkeypatch: pytest.MonkeyPatch, patterns: str | list[str], says: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        expand(patterns)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x:0.tar", "#?%20.tar"])
def test_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    samples = colour_samples(7)
    monkeypatch.chdir(tmp_path)
    write_shard(Path(name), samples)
    read = list(read_shard(name))
    assert [{k: v for k, v in s.items() if not k.startswith("__")} for s in read] == [
        {k: v.encode() if isinstance(v, str) else v for k, v in s.items()} for s in samples
    ]
    assert [s["__key__"] for s in read] == [f"{n:06d}" for n in range(7)]
    assert {s["__url__"] for s in read} == {name}
    assert not caplog.records
    assert list(read_shard(f"pipe:cat '{tmp_path}/{name}'"))[3]["txt"] == read[3]["txt"]
    assert not caplog.records


def tar_of(path: Path, members: list[tuple[str, bytes]], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # pyright: ignore
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_members(kind: int, tmp_path: Path) -> None:
    long = "deep/" * 12 + "n" * 60
    shard = tar_of(
        tmp_path / "x.tar",
        [
            ("__meta__/info.json", b"1"),
            ("./0001.JPG", b"2"),
            ("./._0001.jpg", b"3"),  # what macOS adds
            ("./0001.seg.png", b"4"),
            ("README", b"5"),
            (f"{long}.jpg", b"6"),
            (f"{long}.txt", b"7"),
        ],
        format=kind,
    )
    first, second = read_shard(str(shard))
    assert {k: v for k, v in first.items() if k != "__url__"} == {"__key__": "./0001", "jpg": b"2", "seg.png": b"4"}
    assert {k: v for k, v in second.items() if k != "__url__"} == {"__key__": long, "jpg": b"6", "txt": b"7"}


def offsets(shard: Path) -> list[int]:
    """Where the headers of a plain tar lie, and where its end mark does."""
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        return [m.offset for m in members] + [members[-1].offset_data + 512 * -(-members[-1].size // 512)]


COUNT = 12


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """12 samples of 4 members."""
    return write_shard(tmp_path / "x.tar", colour_samples(COUNT))


def damaged(shard: Path, how: str) -> None:
    data, at = bytearray(shard.read_bytes()), offsets(shard)
    match how:
        case "zeroed header":
            data[at[20] : at[20] + 512] = bytes(512)
        case "damaged header":
            data[at[20] + 3] ^= 0xFF
        case "cut in a header":
            del data[at[20] + 100 :]
        case "cut in a member":
            del data[at[20] + 600 :]
        case "cut in the padding":
            del data[at[21] - 1 :]
        case "cut between members":
            del data[at[20] :]
    shard.write_bytes(data)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "how", ["zeroed header", "damaged header", "cut in a header", "cut in a member", "cut between members"]
)
def test_damage_is_logged(how: str, packed: bool, shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    """tarfile and webdataset end at most of these as if the shard had ended.

    The sample before the damage may lack members, and is left out but where the cut is a clean one.
    """
    damaged(shard, how)
    if packed:
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    whole = [k for k, s in zip(keys(shard), read_shard(str(shard)), strict=True) if set(PLAIN) <= s.keys()]
    count = 5 if how == "cut between members" else 4
    assert whole == [f"{n:06d}" for n in range(count)]
    (warning, *_) = caplog.records
    assert str(shard) in warning.getMessage()
    assert warning.levelno == logging.WARNING
    assert ("no end mark" if count == 5 else "4 samples were read before") in warning.getMessage()


def test_truncated_gzip_is_logged_with_the_count(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = gzip.compress(shard.read_bytes())
    shard.write_bytes(packed[: len(packed) * 2 // 3])
    read = keys(shard)
    assert 0 < len(read) < COUNT
    assert read == [f"{n:06d}" for n in range(len(read))]
    assert f"{len(read)} samples were read before" in caplog.text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty file"),
        (b"<html>404</html>" * 100, "0 samples were read before"),
        (b"\x1f\x8b\x08", "0 samples were read before"),
        (gzip.compress(b"no archive" * 100), "0 samples were read before"),
        (None, "No such file"),
    ],
    ids=["empty", "html", "half a header", "packed text", "missing"],
)
def test_what_is_no_shard_is_logged(
    content: bytes | None, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.tar"
    if content is not None:
        path.write_bytes(content)
    assert keys(path) == []
    assert says in caplog.text
    assert str(path) in caplog.text


def test_pipe_that_fails_is_logged(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    for command in (f"pipe:head -c 9000 {shard}; exit 3", f"pipe:cat {shard}; exit 3", "pipe:exit 3"):
        caplog.clear()
        assert len(keys(command)) <= COUNT
        assert command in caplog.text
        assert "exit 3" in caplog.text
        assert "samples were read before" in caplog.text


def test_archive_without_end_mark_keeps_its_last_sample(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = shard.read_bytes()[: offsets(shard)[-1]]
    shard.write_bytes(data)
    assert len(keys(shard)) == COUNT
    assert "has no end mark" in caplog.text


def test_neighbours_of_one_key_are_samples_each(tmp_path: Path) -> None:
    files = [("0.txt", b"a"), ("1.txt", b"b"), ("1.JPG", b"x"), ("1.txt", b"c"), ("1.__key__", b"e"), ("2.txt", b"d")]
    shard = tar_of(tmp_path / "x.tar", files)
    assert keys(shard) == ["0", "1", "1", "2"]
    assert texts(shard) == ["a", "b", "c", "d"]
    assert [s.get("jpg") for s in read_shard(str(shard))] == [None, b"x", None, None]


def test_sparse_member_is_not_unpacked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A header of 512 bytes that promises 4 GiB of zeros."""
    info = tarfile.TarInfo("0.jpg")
    info.type, info.size = tarfile.GNUTYPE_SPARSE, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = header[398:410] = header[483:495] = b"%011o\0" % 0
    header[483:495] = b"%011o\0" % (1 << 32)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "x.tar").write_bytes(bytes(header) + bytes(10240))
    assert keys(tmp_path / "x.tar") == []
    assert "sparse" in caplog.text


def test_shard_of_other_names_is_damaged(tmp_path: Path) -> None:
    name = str(write_shard(tmp_path / "1.tar", [{"png": b"1", "caption": "x"}, {"caption": "x"}]))
    told: list[Damage] = []
    found = list(read_part(name, PLAIN, on_damage=told.append))
    assert found == [(0, LeftOut("no caption")), (1, LeftOut("no image"))]
    ((shard, kind, text),) = told
    assert (shard, kind) == (name, "damaged")
    assert text.startswith("it has no sample with png and txt; its members are: caption, png.")


@pytest.mark.parametrize("how", ["gone", "cut", "shorter"])
def test_samples_that_are_missing_keep_their_places(how: str, shards: list[str]) -> None:
    path, told = Path(shards[2]), []
    whole = list(read_part(shards[2], PLAIN))
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:8000])
    else:
        write_shard(path, [{name: sample[name] for name in PLAIN} for _, sample in whole[:9] if sample])
    for part in range(2):
        found = list(read_part(shards[2], PLAIN, count=17, part=part, parts=2, first=4, on_damage=told.append))
        assert [index for index, _ in found] == list(range(4 + part, 17, 2)), "those that are missing too"
        read = [(index, sample["txt"]) for index, sample in found if sample]
        assert read == [(i, s["txt"]) for i, s in whole if s and i in dict(read)]
        assert len(read) == {"gone": 0, "cut": len(read), "shorter": 3 - part}[how]
    assert [damage.kind for damage in told] == ["damaged"] * 2
    assert how != "shorter" or "it holds 9 samples, where the manifest in its folder says 17" in told[0].text


def test_only_what_is_wanted_is_kept(shards: list[str]) -> None:
    ((_, sample), *_) = read_part(shards[2], PLAIN)
    assert sample is not None
    assert set(sample) == {"__key__", "__url__", "png", "txt"}


def test_samples_that_lack_something_are_left_out(tmp_path: Path) -> None:
    samples = colour_samples(10)
    bare = [{"png": s["png"]} for s in samples]
    poor = str(write_shard(tmp_path / "1.tar", [*bare[:7], samples[0], {"txt": "x"}, {"json": "{}"}]))
    found = dict(read_part(poor, PLAIN))
    assert [index for index, sample in found.items() if isinstance(sample, dict)] == [7]
    reasons = [sample.reason for sample in found.values() if isinstance(sample, LeftOut)]
    assert reasons == ["no caption"] * 7 + ["no image"] * 2
    assert list(read_part(poor, PLAIN, part=1, parts=2, first=8)) == [(9, LeftOut("no image"))]


def test_parts_of_a_shard(shards: list[str]) -> None:
    whole = list(read_part(shards[2], PLAIN))
    assert [index for index, _ in whole] == list(range(17))
    parts = [list(read_part(shards[2], PLAIN, part=part, parts=3, first=4)) for part in range(3)]
    assert [[index for index, _ in part] for part in parts] == [[6, 9, 12, 15], [4, 7, 10, 13, 16], [5, 8, 11, 14]]
    assert all(sample == whole[index][1] for part in parts for index, sample in part)
    assert list(read_part(shards[2], PLAIN, part=20, parts=30)) == [], "no sample, but nothing is wrong with the shard"


def check(*shards: Path, field: str = "txt") -> None:
    captions = Captions(field)
    check_members([str(s) for s in shards], ("png", captions.member), captions.all)


def test_captions_are_taken_before_training(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "0.tar", colour_samples(120))
    check(shard)
    check(shard, field="json.captions")
    with pytest.raises(ValueError, match=r"0\.tar: no caption .*json field 'nothing' .* has: captions, n\. Check"):
        check(shard, field="json.nothing")
    blank = write_shard(tmp_path / "1.tar", [{"png": b"1", "txt": " "}])
    with pytest.raises(ValueError, match="has no text in txt"):
        check(blank)
    check(write_shard(tmp_path / "2.tar", [{"png": b"1", "txt": " "}, {"png": b"1", "txt": "a"}]))


def test_shards_that_cannot_be_read_are_found_before_training(tmp_path: Path) -> None:
    junk, empty = tmp_path / "junk.tar", tmp_path / "empty.tar"
    junk.write_bytes(b"<html>404</html>" * 100)
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match=r"^no sample could be read from .*junk\.tar: expected \.tar"):
        check(junk)
    with pytest.raises(ValueError, match=r"from any of 2 shards, such as .*junk\.tar: expected"):
        check(junk, empty)
    check(junk, write_shard(tmp_path / "good.tar", colour_samples(2)))  # as in training, where it is passed over
    check_members([str(junk), "s3://bucket/0.tar"], ("png",), Captions("txt").all)  # an address is not read for a check


def test_digest_is_of_names_and_order() -> None:
    digest = names_digest({"x": ["a/0.tar", "a/1.tar"]})
    assert digest == names_digest({"x": ["/moved/0.tar", "https://b/1.tar?signature=a/b"]})
    others = [
        {"x": ["a/1.tar", "a/0.tar"]},
        {"x": ["a/0.tar"]},
        {"x": ["a/0.tar", "a/1.tar", "a/2.tar"]},
        {"x": ["a/0.tar", "a/1.tar.gz"]},
        {"x": ["a/0.tar"], "y": ["a/1.tar"]},
        {"y": ["a/0.tar"], "x": ["a/1.tar"]},
    ]
    assert len({digest, *map(names_digest, others)}) == 7


def test_member_takes_the_first_extension() -> None:
    sample = {"__key__": "0", "png": b"p", "webp": b"w", "txt": b""}
    assert member(sample, "jpg;webp;png") == b"w"
    assert member(sample, "jpg") is None
    assert member(sample, "txt") == b""


@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_damage_is_told_by_each_lane_that_meets_it(lanes: int, shards: list[str]) -> None:
    Path(shards[1]).write_bytes(Path(shards[1]).read_bytes()[:6000])
    damaged(Path(shards[2]), "cut between members")
    Path(shards[4]).unlink()
    told: list[Damage] = []
    for lane in range(lanes):
        list(share_of_lane(shards, lane=lane, lanes=lanes, on_damage=told.append))
    assert {damage.shard for damage in told} == {shards[1], shards[2], shards[4]}
    assert len(told) == (4 if lanes == 7 else 3), "two of seven share shard 1"


def test_lanes_read_no_more_shards_than_they_must(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With many loader processes the same bytes would be read and unpacked again and again."""
    import clipq.data.shards as module

    opened: list[str] = []
    original = module.read_shard
    monkeypatch.setattr(module, "read_shard", lambda shard, **more: opened.append(shard) or original(shard, **more))
    for lanes in (1, 3, 5, 8, 13):
        opened.clear()
        for lane in range(lanes):
            list(share_of_lane(shards, lane=lane, lanes=lanes))
        assert len(opened) == max(lanes, len(shards))
