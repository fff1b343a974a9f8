"""Filters: what is left out and why, and that the others come in an order that nothing else changes."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipq.data import order
from clipq.data.decode import Captions
from clipq.data.filters import LOOK, Filter, Range
from clipq.data.loader import StreamPlace, batches
from clipq.data.shards import DataError
from clipq.data.source import Source
from tests.helpers import encode, picture, write_shard
from tests.streams import TEXT, mixed, numbers, same, taken

STRICT = Filter(
    min_size=12,
    max_aspect=2.0,
    caption_length=Range(high=8),
    json={"similarity": Range(0.3), "unsafe": Range(high=0.9)},
)


def sample(n: int, *, size: tuple[int, int] = (16, 16), text: str = "a", **record: Any) -> dict[str, bytes | str]:
    image = picture("red", n).resize(size)
    return {"png": encode(image), "txt": f"{text} {n}", "json": json.dumps({"similarity": 0.3, "unsafe": 0.1} | record)}


def varied(count: int, first: int = 0) -> tuple[list[dict[str, bytes | str]], list[str | None]]:
    """Samples of every kind, of which each seventh is kept, as is the last; and why `STRICT` leaves each out."""
    kinds: list[tuple[dict[str, Any], str | None]] = [
        ({"similarity": None}, "json.similarity.missing"),
        ({"similarity": 0.29}, "json.similarity"),
        ({"unsafe": 0.95}, "json.unsafe"),
        ({"text": "a long one"}, "caption_length"),
        ({"size": (11, 16)}, "min_size"),
        ({"size": (12, 25)}, "max_aspect"),
        ({}, None),
    ]
    chosen = [kinds[-1] if n == count - 1 else kinds[n % 7] for n in range(count)]
    return [sample(first + n, **kind) for n, (kind, _) in enumerate(chosen)], [reason for _, reason in chosen]


COUNTS = [20, 11, 17, 5, 20]


@pytest.fixture
def expected(tmp_path: Path) -> tuple[list[str], list[str | None]]:
    """Shards, and for each of their samples why it is left out."""
    shards, reasons = [], []
    for number, count in enumerate(COUNTS):
        samples, why = varied(count, len(reasons))
        shards.append(str(write_shard(tmp_path / f"{number}.tar", samples)))
        reasons += why
    return shards, reasons


def filtered(found: list[dict[str, Any]]) -> Counter[str]:
    whole = Counter[str]()
    for batch in found:
        whole.update(batch["filtered"])
    return +whole


def strict(shards: list[str], **options: Any) -> Any:
    return mixed([Source(shards, TEXT, "png", filter=STRICT)], **({"lanes": 3, "batch_size": 4} | options))


@pytest.mark.parametrize("shuffle", [1, 6])
def test_what_is_left_out_is_counted_by_reason(expected: tuple[list[str], list[str | None]], shuffle: int) -> None:
    """Exactly: of each pass, since the last sample of a shard is kept."""
    shards, reasons = expected
    kept = {n for n, reason in enumerate(reasons) if reason is None}
    once = Counter(reason for reason in reasons if reason is not None)
    assert len(once) == 6, "each reason occurs"
    found = taken(strict(shards, lanes=1, batch_size=len(kept), shuffle=1), 5)
    for passes in range(1, 6):
        assert Counter(numbers(found[:passes])) == dict.fromkeys(kept, passes)
        assert filtered(found[:passes]) == {reason: count * passes for reason, count in once.items()}
    assert all(batch["lost"] == 0 for batch in found)
    many = taken(strict(shards, lanes=4, batch_size=len(kept), shuffle=shuffle), 40)
    assert set(numbers(many)) == kept
    for reason, count in filtered(many).items():
        assert once[reason] * 35 < count <= once[reason] * 44, "lanes are some passes apart"


def test_order_is_that_of_shards_without_what_is_left_out(
    expected: tuple[list[str], list[str | None]], tmp_path: Path
) -> None:
    """A filter only takes away: what is left is shuffled as if the rest had never been there."""
    shards, reasons = expected
    bare, first = [], 0
    for number, count in enumerate(COUNTS):
        samples, _ = varied(count, first)
        own = [s for s, reason in zip(samples, reasons[first : first + count], strict=True) if reason is None]
        bare.append(str(write_shard(tmp_path / "bare" / f"{number}.tar", own)))
        first += count
    for options in ({"shuffle": 1}, {"shuffle": 5}, {"shuffle": 5, "lanes": 5}):
        plain = mixed([Source(bare, TEXT, "png")], **({"lanes": 3, "batch_size": 4} | options))
        assert numbers(taken(strict(shards, **options), 20)) == numbers(taken(plain, 20))


def test_batches_are_the_same_for_any_number_of_processes(expected: tuple[list[str], list[str | None]]) -> None:
    whole = taken(strict(expected[0]), 15)
    for workers in (1, 2):
        found = taken(strict(expected[0]), 15, workers)
        assert same(found, whole)
        assert [batch["filtered"] for batch in found] == [batch["filtered"] for batch in whole]


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 0), (2, 1)])
@pytest.mark.parametrize("shuffle", [1, 5])
def test_resumed_loader_yields_what_an_uninterrupted_one_does(
    expected: tuple[list[str], list[str | None]], before: int, after: int, shuffle: int
) -> None:
    """And counts what it does: nothing twice that is read again."""
    s = strict(expected[0], shuffle=shuffle)
    whole = taken(s, 24, before)
    for start in (1, 2, 5, 9, 16):
        found = taken(s.starting_at(whole[start - 1]["place"]), 24 - start, after)
        assert same(found, whole[start:]), start
        assert [batch["filtered"] for batch in found] == [batch["filtered"] for batch in whole[start:]], start


def test_ranks_share_the_batches_that_one_process_has(expected: tuple[list[str], list[str | None]]) -> None:
    def of_ranks(ranks: int, place: StreamPlace | None, count: int) -> tuple[list[Any], StreamPlace]:
        rows, places = [[Counter(), Counter()] for _ in range(count)], []
        for rank in range(ranks):
            s = strict(expected[0], lanes=6, batch_size=12 // ranks, rank=rank, world_size=ranks)
            found = taken(s if place is None else s.starting_at(place.of_rank(rank, ranks)), count)
            places.append(found[-1]["place"])
            for (keys, reasons), batch in zip(rows, found, strict=True):
                keys.update(batch["key"])
                reasons.update(batch["filtered"])
        return rows, StreamPlace.of_all(places)

    whole, end = of_ranks(1, None, 9)
    found, place = of_ranks(2, None, 3)
    for ranks, count in ((3, 2), (1, 1), (2, 3)):
        more, place = of_ranks(ranks, place, count)
        found += more
    assert found == whole
    assert torch.equal(place.lanes, end.lanes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_heavy_filter_is_no_loss(tmp_path: Path, workers: int) -> None:
    """Of 400 samples twelve are kept, and seven of ten shards have none. Nothing may be lost, and nothing is."""
    kept = {*range(5), 83, 84, 85, 86, 397, 398, 399}
    shards = [
        str(
            write_shard(
                tmp_path / f"{s}.tar", [sample(n, similarity=float(n in kept)) for n in range(s * 40, s * 40 + 40)]
            )
        )
        for s in range(10)
    ]
    source = Source(shards, TEXT, "png", filter=Filter(json={"similarity": Range(0.5)}))
    s = mixed([source], lanes=4, batch_size=6)
    found = list(itertools.islice(batches(s, workers=workers, max_lost=0.0), 60))
    times = Counter(numbers(found))
    assert set(times) == kept
    assert max(times.values()) - min(times.values()) <= 6, "without replacement, lanes some passes apart"
    assert sum(batch["lost"] for batch in found) == 0
    assert 0.95 < filtered(found)["json.similarity"] / (30 * 388) < 1.05


def test_one_sample_of_all(tmp_path: Path) -> None:
    """A lane may meet the shard that has it late: the others are no proof that there is none."""
    shards = [str(write_shard(tmp_path / f"{n}.tar", [sample(2 * n), sample(2 * n + 1)])) for n in range(6)]
    for lanes in (1, 5, 12):
        source = Source(shards, Captions("txt"), "png", filter=Filter(json={"only": Range()}))
        write_shard(Path(shards[4]), [sample(8, only=1), sample(9)])
        assert set(numbers(taken(mixed([source], lanes=lanes), 60))) == {8}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_filter_that_leaves_out_all_ends_the_run(expected: tuple[list[str], list[str | None]], workers: int) -> None:
    nothing = Filter(json={"similarity": Range(0.3)}, min_size=100)
    bad = Source(expected[0], TEXT, "png", filter=nothing, setting="data.sources.b")
    says = (
        r"^data\.sources\.b: the filter leaves out all of \d+ samples: min_size \d+, json\.similarity(\.missing)? \d+, "
        r"json\.similarity(\.missing)? \d+\. Loosen data\.filter"
    )
    with pytest.raises(DataError, match=says):
        taken(mixed([Source(expected[0], TEXT, "png"), bad], lanes=4), 3, workers)
    with pytest.raises(DataError, match=says.replace(r"all of \d+", "all of 73")):
        bad.check()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [0, 2])
def test_of_a_large_data_set_not_all_is_read(
    expected: tuple[list[str], list[str | None]], workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "MOST_LEFT_OUT", 30)
    s = mixed([Source(expected[0], TEXT, "png", filter=Filter(min_size=100))], lanes=4)
    with pytest.raises(DataError, match=r"^data\.shards: the filter leaves out all of 30 samples: min_size 30\. "):
        taken(s, 3, workers)


def test_the_look_before_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At as many samples of each shard, since a part of the data may be all left out."""
    assert LOOK >= 1000
    monkeypatch.setattr("clipq.data.filters.LOOK", 8)
    shards = [str(write_shard(tmp_path / f"{n}.tar", [sample(n, similarity=n / 10)] * 3)) for n in range(4)]
    Source(shards, TEXT, "png", filter=Filter(json={"similarity": Range(0.3)})).check()
    with pytest.raises(DataError, match=r"all of 8 samples: json\.similarity 8"):
        Source(shards, TEXT, "png", filter=Filter(json={"similarity": Range(0.4)})).check()


def test_a_broken_shard_is_not_filled_up(expected: tuple[list[str], list[str | None]]) -> None:
    """Of its samples most would have been left out: spares for all of them would be too many."""
    shards, reasons = expected
    Path(shards[2]).unlink()
    source = Source(shards, TEXT, "png", counts=list(COUNTS), filter=STRICT)
    found = taken(mixed([source], lanes=1, batch_size=1), 60)
    kept = {n for n, reason in enumerate(reasons) if reason is None and n not in range(31, 48)}
    assert set(numbers(found)) == kept
    times = Counter(numbers(found))
    assert max(times.values()) - min(times.values()) <= 2
    assert 5 <= sum(batch["lost"] for batch in found) <= 9, "the shard, once a pass"


def test_unreadable_samples_are_lost_and_replaced_by_what_is_kept(tmp_path: Path) -> None:
    samples = [sample(n, similarity=float(n % 2)) for n in range(40)]
    for n in (4, 7):
        samples[n]["png"] = b"no image"
    source = Source(
        [str(write_shard(tmp_path / "0.tar", samples))],
        *(TEXT, "png"),
        filter=Filter(json={"similarity": Range(0.5)}, min_size=3),
    )
    found = taken(mixed([source], lanes=1, batch_size=20, shuffle=4), 3)
    assert set(numbers(found)) == set(range(1, 40, 2)) - {7}
    assert [batch["lost"] for batch in found] == [1, 1, 1], "sample 4 is left out, whatever it is"


def test_each_source_has_its_own(expected: tuple[list[str], list[str | None]]) -> None:
    a = Source(expected[0][:3], TEXT, "png", weight=2.0, filter=Filter(min_size=12))
    b = Source(expected[0][3:], TEXT, "png", filter=Filter(json={"similarity": Range(0.3)}))
    found = taken(mixed([a, b], lanes=2), 40)
    reasons = ["json.similarity", "json.similarity.missing", "min_size", "no caption", "no image"]
    assert all(sorted(batch["filtered"]) == reasons for batch in found), "those of every source, 0 among them"
    left = set(numbers(found))
    assert {n for n in range(48) if expected[1][n] == "min_size"} == set(range(48)) - left
    assert {n for n in range(48, 73) if str(expected[1][n]).startswith("json.sim")} == set(range(48, 73)) - left
    whole = taken(mixed([Source(expected[0], TEXT, "png")], lanes=2), 2)
    assert [batch["filtered"] for batch in whole] == [{"no image": 0, "no caption": 0}] * 2


def test_captions_of_other_lengths_are_not_chosen(tmp_path: Path) -> None:
    samples = []
    for n in range(10):
        captions = [f"aaa {n}", f"bbbbbb {n}", f"c {n}", " "]
        samples.append({"png": encode(picture("red", n)), "json": json.dumps({"c": captions if n else captions[:2]})})
    shards = [str(write_shard(tmp_path / "0.tar", samples))]
    source = Source(shards, Captions("json.c"), "png", filter=Filter(caption_length=Range(3, 5)))
    found = taken(mixed([source], lanes=1, batch_size=10), 20)
    assert {chr(c) for batch in found for c in batch["text"][:, 1].tolist()} == {"a", "c"}
    source = Source(shards, Captions("json.c"), "png", filter=Filter(caption_length=Range(high=3)))
    found = taken(mixed([source], lanes=1, batch_size=9), 3)
    assert set(numbers(found)) == set(range(1, 10)), "the first has no short one"
    assert sum(batch["lost"] for batch in found) == 0


def why(filter: Filter, captions: Captions = TEXT, **members: bytes | str) -> str | None:
    data = {name: m.encode() if isinstance(m, str) else m for name, m in members.items()}
    return filter.reason({"__key__": "k", **data}, "jpg;png;webp;gif", captions)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "gif"])
def test_size_and_aspect(kind: str) -> None:
    """Of a picture on its side too, and both bounds are within."""
    for size in ((20, 50), (50, 20)):
        data = encode(Image.new("RGB", size), {"jpg": "JPEG"}.get(kind, kind.upper()))
        assert why(Filter(min_size=20), **{kind: data}) is None
        assert why(Filter(min_size=21), **{kind: data}) == "min_size"
        assert why(Filter(max_aspect=2.5), **{kind: data}) is None
        assert why(Filter(max_aspect=2.49), **{kind: data}) == "max_aspect"
        assert why(Filter(max_aspect=2.0, min_size=30), **{kind: data}) == "min_size"
    rotated = Image.Exif()
    rotated[0x0112] = 6
    data = encode(Image.new("RGB", (20, 50)), "JPEG", exif=rotated)
    assert why(Filter(min_size=20, max_aspect=2.5), jpg=data) is None


def test_only_the_header_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("JPEG", "PNG"):
        data = encode(picture("red", 0, 64), kind)
        assert why(Filter(min_size=64), jpg=data[: len(data) // 2]) is None
        assert why(Filter(min_size=65), jpg=data[: len(data) // 2]) == "min_size"


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10"])
def test_what_is_no_image_is_not_a_filters_to_judge(data: bytes) -> None:
    assert why(Filter(min_size=9, max_aspect=1.5), jpg=data) is None


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *(("0.28", None), ("1", None), ("0.279", "json.x"), ("1.01", "json.x"), ("NaN", "json.x"), ("1e999", "json.x")),
        *((v, "json.x.missing") for v in ("null", '"0.5"', "true", "[0.5]", "{}")),
    ],
)
def test_range_of_a_field(value: str, reason: str | None) -> None:
    assert why(Filter(json={"x": Range(0.28, 1)}), json=f'{{"y": 2, "x": {value}}}') == reason


def test_open_ranges_and_missing_fields() -> None:
    assert why(Filter(json={"x": Range(0.5)}), json='{"x": 1e300}') is None
    assert why(Filter(json={"x": Range(high=0.5)}), json='{"x": -3}') is None
    assert why(Filter(json={"x": Range()}), json='{"y": 1}') == "json.x.missing"
    assert why(Filter(json={"x": Range(), "y": Range(2)}), json='{"x": 1, "y": 1}') == "json.y"
    for broken in (b"{", b"[1]", b"\xff", b"[" * 100_000):
        assert why(Filter(json={"x": Range()}), json=broken) == "json.x.missing"
    assert why(Filter(json={"x": Range()}), txt="a") == "json.x.missing"


@pytest.mark.parametrize(
    ("text", "length", "reason"),
    [
        *(("abc", (3, 3), None), (" abc\n", (3, 3), None), ("äöü", (3, 3), None)),
        *(("abc", (4, math.inf), "caption_length"), ("abc", (0, 2), "caption_length")),
        *((" ", (1, math.inf), "caption_length"), (" ", (0, 5), None)),  # a fault, where it is not asked for
        (b"\xff", (1, 5), None),
    ],
)
def test_length_of_a_caption(text: str | bytes, length: tuple[float, float], reason: str | None) -> None:
    assert why(Filter(caption_length=Range(*length)), txt=text) == reason


def test_reasons_are_all_that_there_may_be() -> None:
    assert Filter().reasons == ()
    assert STRICT.reasons == (
        *("json.similarity.missing", "json.similarity", "json.unsafe.missing", "json.unsafe"),
        *("caption_length", "min_size", "max_aspect"),
    )
