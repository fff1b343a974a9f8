"""Captions: where they are, and which is chosen."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from clipq.data.decode import Captions


def caption_of(source: str, lines: bool = False, **members: bytes) -> list[str]:
    return Captions(source, lines).all({"__key__": "k7", **members})


def test_captions() -> None:
    record = json.dumps({"one": " a dog ", "several": ["a", " ", "b\n"], "none": None, "numbers": [1], "empty": []})
    assert caption_of("txt", txt=b" a red\ncircle \n") == ["a red\ncircle"]
    assert caption_of("txt", True, txt="a\r\n\n b \nç\n".encode()) == ["a", "b", "ç"]
    assert caption_of("json.one", json=record.encode()) == ["a dog"]
    assert caption_of("json.several", json=record.encode()) == ["a", "b"]
    assert caption_of("json.one", True, json=b'{"one": "a\\nb"}') == ["a", "b"]
    for source, members, says in [
        ("txt", {}, "sample k7 has no txt member"),
        ("txt", {"txt": b" \n"}, "sample k7 has no text in txt"),
        ("txt", {"txt": b"caf\xe9"}, "sample k7: its caption is not UTF-8"),
        ("json.one", {"txt": b"x"}, "k7 has no json member"),
        ("json.caption", {"json": record.encode()}, "'caption' is not text; the record has: one, several, none"),
        ("json.none", {"json": record.encode()}, "'none' is not text"),
        ("json.numbers", {"json": record.encode()}, "'numbers' is not text"),
        ("json.empty", {"json": record.encode()}, "no text in json.empty"),
        ("json.one", {"json": b"[1, 2]"}, "the record has: list"),
        ("json.one", {"json": b"{'one'"}, "k7: its json member cannot be read"),
        ("json.one", {"json": b"\xff\xfe"}, "cannot be read"),
        ("json.one", {"json": b"[" * 100_000}, "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=says):
            caption_of(source, **members)


def test_one_caption_is_drawn_evenly() -> None:
    captions, rng = Captions("json.c"), random.Random(0)
    sample = {"__key__": "k", "json": json.dumps({"c": ["a", "b", "c"]}).encode()}
    drawn = [captions.one(sample, rng) for _ in range(600)]
    assert all(150 < drawn.count(c) < 250 for c in "abc")


MIXED = Captions({"json.b": 0.5, "txt": 0.3, "json.a": 0.2})


def mixed_sample(n: int, *fields: str) -> dict[str, Any]:
    record = {name[5:]: [f"{name} {i}" for i in range(2)] for name in fields if name != "txt"}
    return {"__key__": f"{n}", "json": json.dumps(record).encode(), **({"txt": b"txt"} if "txt" in fields else {})}


def shares(captions: Captions, sample: dict[str, Any], **options: Any) -> dict[str, float]:
    drawn = Counter(captions.one(sample, random.Random(n), **options).split()[0] for n in range(3000))
    return {field: count / 3000 for field, count in drawn.items()}


def test_fields_are_drawn_by_their_probabilities() -> None:
    """Of those that the sample has."""
    whole = mixed_sample(0, "txt", "json.a", "json.b")
    assert shares(MIXED, whole) == pytest.approx({"json.b": 0.5, "txt": 0.3, "json.a": 0.2}, abs=0.03)
    for missing, expected in (("json.b", {"txt": 0.6, "json.a": 0.4}), ("txt", {"json.b": 5 / 7, "json.a": 2 / 7})):
        sample = mixed_sample(0, *({"txt", "json.a", "json.b"} - {missing}))
        assert shares(MIXED, sample) == pytest.approx(expected, abs=0.03)
    for blank in (b" \n", b"\xff"):
        assert "txt" not in shares(MIXED, whole | {"txt": blank})
    assert shares(MIXED, whole | {"json": b"{"}) == {"txt": 1.0}
    long = shares(MIXED, whole, fits=lambda caption: len(caption) > 3)
    assert long == pytest.approx({"json.b": 5 / 7, "json.a": 2 / 7}, abs=0.03)
    assert sorted({MIXED.one(mixed_sample(0, "json.a"), random.Random(n)) for n in range(20)}) == [
        "json.a 0",
        "json.a 1",
    ]


def test_the_order_of_the_fields_changes_nothing() -> None:
    other = Captions({"txt": 0.3, "json.a": 0.2, "json.b": 0.5})
    sample = mixed_sample(0, "txt", "json.a", "json.b")
    assert other == MIXED
    for n in range(50):
        assert MIXED.one(sample, random.Random(n)) == other.one(sample, random.Random(n))
    assert MIXED.all(sample) == other.all(sample) == ["json.a 0", "json.a 1", "json.b 0", "json.b 1", "txt"]


def test_a_sample_with_none_of_the_fields() -> None:
    assert set(MIXED.member.split(";")) == {"json", "txt"}
    assert MIXED.all(mixed_sample(0, "txt")) == ["txt"]
    with pytest.raises(ValueError, match=r"json field 'a' is not text.*'b' is not text.*has no txt member"):
        MIXED.all(mixed_sample(0))
    for sample in (mixed_sample(0), {"__key__": "k", "txt": b" "}):
        with pytest.raises(ValueError):
            MIXED.one(sample, random.Random(0))
