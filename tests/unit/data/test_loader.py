"""The training stream: its order, what a resumed loader yields, and what happens to samples that cannot be read."""

from __future__ import annotations

import itertools
import json
import pickle
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import get_worker_info

from clipq.data.decode import Captions, TrainTransform
from clipq.data.loader import StreamPlace, batches, default_workers
from clipq.data.source import Source
from tests.helpers import colour_shards, encode, picture, write_shard
from tests.streams import TEXT, mixed, numbers, same, stream, taken


def test_batch(shards: list[str]) -> None:
    (batch,) = taken(stream(shards), 1)
    assert batch["image"].shape == (6, 3, 8, 8)
    assert batch["image"].dtype == torch.uint8
    assert batch["image"].is_contiguous()
    assert batch["text"].shape == (6, 4)
    assert batch["text"].dtype == torch.int32
    # Each image is that of its caption: the mean colour tells.
    colours = np.array([np.asarray(picture(c, 0)).mean((0, 1)) for c in ("red", "green", "blue", "yellow")])
    for image, text in zip(batch["image"], batch["text"], strict=True):
        mean = image.float().mean((1, 2)).numpy()
        assert np.abs(colours - mean).sum(1).argmin() == int(text[0]) % 4


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_batches_are_the_same_for_any_number_of_processes(shards: list[str], workers: int) -> None:
    whole = taken(stream(shards), 12)
    assert same(taken(stream(shards), 12, workers), whole)
    assert not same(whole[:4], taken(stream(shards, seed=1), 4))


class SlowInOneProcess(TrainTransform):
    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        info = get_worker_info()
        if info is not None and info.id == 1:
            time.sleep(0.005)
        return super().__call__(data, rng)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_process_writes_to_a_batch_that_is_not_taken_yet(shards: list[str], prefetch: int) -> None:
    s = stream(shards, transform=SlowInOneProcess((8, 8)), batch_size=16)
    ahead = list(itertools.islice(batches(s, workers=2, prefetch=prefetch), 8))
    assert same(ahead, taken(s, 8))


class FailsInOneProcess(TrainTransform):
    """At the 25th image of process 0, while process 1 takes its time."""

    def __call__(self, data: bytes, rng: random.Random) -> Tensor:
        info = get_worker_info()
        if info is not None and info.id == 0:
            self.__dict__["seen"] = self.__dict__.get("seen", 0) + 1
            if self.__dict__["seen"] == 25:
                raise RuntimeError("a fault")
        if info is not None and info.id == 1:
            time.sleep(0.005)
        return super().__call__(data, rng)


def test_batches_before_an_error_are_whole(shards: list[str]) -> None:
    """Those that a run still trains on, and may save."""
    s = stream(shards, transform=FailsInOneProcess((8, 8)), batch_size=16, lanes=4)
    given, found = batches(s, workers=2, prefetch=4), []
    for _ in range(3):
        time.sleep(0.3)
        found.append(next(given))
    time.sleep(0.3)
    with pytest.raises(RuntimeError, match="a fault"):
        next(given)
    assert same(found, taken(s, 3))


def test_processes_send_no_tensors(shards: list[str]) -> None:
    """Torch would send them through /dev/shm, which is small in containers: a process that finds it full is killed."""
    s = stream(shards)
    assert b"torch" not in pickle.dumps(next(s.parts(s.slots(1), 0, 1)))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 3), (4, 1), (2, 2)])
def test_resumed_loader_yields_what_an_uninterrupted_one_does(shards: list[str], before: int, after: int) -> None:
    """In the first pass, at its end and in the next: 73 pairs are a pass."""
    s = stream(shards)
    whole = taken(s, 30, before)
    for start in (1, 5, 12, 19):
        assert same(taken(s.starting_at(whole[start - 1]["place"]), 30 - start, after), whole[start:]), start


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 12), st.integers(0, 2), st.integers(0, 99))
def test_resumed_loader_property(shards: list[str], start: int, size: int, buffer: int, rank: int, seed: int) -> None:
    s = stream(shards, batch_size=size, shuffle=buffer, rank=rank, world_size=3, seed=seed)
    whole = taken(s, start + 2)
    assert same(taken(s.starting_at(whole[start - 1]["place"]), 2), whole[start:])


def of_ranks(shards: list[str], ranks: int, place: StreamPlace | None, *, batch: int, count: int) -> tuple[Any, ...]:
    """The keys of the next batches over all ranks, and where they are after them."""
    keys, places = [Counter() for _ in range(count)], []
    for rank in range(ranks):
        s = stream(shards, lanes=12, rank=rank, world_size=ranks, batch_size=batch // ranks)
        found = taken(s if place is None else s.starting_at(place.of_rank(rank, ranks)), count)
        places.append(found[-1]["place"])
        for total, b in zip(keys, found, strict=True):
            total.update(b["key"])
    return keys, StreamPlace.of_all(places)


def test_ranks_share_the_batches_that_one_process_has(shards: list[str]) -> None:
    """At any time the ranks may be more or fewer: the order is that of one process, so a pass holds each key once."""
    whole, end = of_ranks(shards, 1, None, batch=24, count=8)
    found, place = of_ranks(shards, 2, None, batch=24, count=3)
    for ranks, count in ((3, 1), (1, 2), (4, 1), (2, 1)):
        more, place = of_ranks(shards, ranks, place, batch=24, count=count)
        found += more
    assert found == whole
    assert place.drawn == end.drawn == 8 * 24
    assert torch.equal(place.lanes, end.lanes)
    # and batches of another size go on where those before ended, although 6 + 18 is no multiple of 24
    first, place = of_ranks(shards, 3, None, batch=6, count=1)
    second, place = of_ranks(shards, 2, place, batch=18, count=1)
    third, _ = of_ranks(shards, 4, place, batch=24, count=1)
    assert [first[0] + second[0], third[0]] == whole[:2]


def test_a_pass_holds_every_sample_once(tmp_path: Path) -> None:
    shards = colour_shards(tmp_path, [12, 12, 12, 12])
    for workers in (0, 2):
        found = numbers(taken(stream(shards, shuffle=1, batch_size=12), 8, workers))
        assert Counter(found[:48]) == Counter(range(48))
        assert Counter(found[48:]) == Counter(range(48))


def test_what_is_random_about_a_sample_is_its_own(shards: list[str]) -> None:
    """Another shuffling, other lanes: each sample is cropped and flipped as before, and anew in the next pass."""
    crops = TrainTransform((8, 8), flip=0.5, scale=(0.2, 1.0))
    first, second = (
        [
            pair
            for b in taken(stream(shards, transform=crops, **order), 40)
            for pair in zip(b["key"], b["image"], strict=True)
        ]
        for order in ({"lanes": 1, "shuffle": 1}, {"lanes": 5, "shuffle": 20})
    )
    found: dict[str, set[bytes]] = {}
    for key, image in second:
        found.setdefault(key, set()).add(image.numpy().tobytes())
    a_pass, the_next = dict(first[:73]), dict(first[73:146])
    assert len(a_pass) == 73
    for key, image in a_pass.items():
        assert image.numpy().tobytes() in found[key]
        assert not torch.equal(image, the_next[key])


@pytest.fixture
def two_sources(shards: list[str]) -> list[Source]:
    """The first has twice the second's weight and two passes: 2 of 48 samples, while 25 are the others' pass."""
    first = Source(shards[:3], TEXT, "png", weight=2.0, passes=2, setting="data.sources.a")
    second = Source(shards[3:], Captions("json.captions"), "png", weight=1.0, setting="data.sources.b")
    return [first, second]


def test_sources_are_mixed_by_weight(two_sources: list[Source]) -> None:
    s = mixed(two_sources, lanes=4, batch_size=12)
    found = taken(s, 30)
    of_first = [n < 48 for n in numbers(found)]
    assert all(7 <= sum(of_first[at : at + 12]) <= 9 for at in range(60)), "evenly, from the first batch on"
    assert Counter(n for n in numbers(found) if n < 48) == dict.fromkeys(range(48), 2), "its two passes, no more"
    assert sum(of_first) == 96
    assert not any(of_first[-60:]), "the other goes on alone"
    for n, batch in enumerate(found):
        first = sum(of_first[n * 12 : n * 12 + 12])
        assert batch["sources"] == {"a": first, "b": 12 - first}
    others = Counter(n for n in numbers(found) if n >= 48)
    assert set(others) == set(range(48, 73))
    assert max(others.values()) - min(others.values()) <= 4, "without replacement: lanes may be some passes apart"


@pytest.mark.parametrize("start", [1, 7, 12, 20])
def test_a_mixture_goes_on_from_its_place(two_sources: list[Source], start: int) -> None:
    """Before the first source is used up, and after."""
    s = mixed(two_sources, lanes=4, batch_size=10)
    whole = taken(s, 26)
    for workers in (0, 3):
        assert same(taken(s.starting_at(whole[start - 1]["place"]), 26 - start, workers), whole[start:])


def test_a_source_is_named_where_it_is_wrong(shards: list[str]) -> None:
    Source(shards, TEXT, "png").check()
    for image, says in (("png", "no caption in its first samples"), ("gif", "has no sample with gif")):
        source = Source(shards, Captions("json.of"), image, setting="data.sources.b")
        with pytest.raises(ValueError, match=rf"^data\.sources\.b: shard .*{says}"):
            source.check()


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.02, 0.5, 0.48)])
def test_of_three_sources_one_is_used_up(weights: tuple[float, ...], shards: list[str]) -> None:
    """From then on a run that goes on and one that was never stopped share the samples of that source alike."""
    names = [shards[3:4], shards[:2], shards[2:3]]
    s = mixed(
        [Source(n, TEXT, "png", weight=w, passes=p) for n, w, p in zip(names, weights, (2, None, None), strict=True)],
        lanes=2,
        batch_size=8,
    )
    whole = taken(s, 60)
    used_up = Counter(n for n in numbers(whole) if 48 <= n < 53)
    assert set(used_up.values()) <= {1, 2}
    for start in range(1, 50, 4):
        assert same(taken(s.starting_at(whole[start - 1]["place"]), 60 - start), whole[start:])
    if weights[0] == 1:
        assert sum(used_up.values()) == 10
        left = Counter(n < 31 for n in numbers(whole[20:]))
        assert 0.45 < left[True] / left.total() < 0.55, "the others share it by their weights"


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_used_up_is_told(shards: list[str], workers: int) -> None:
    source = Source(shards, TEXT, "png", passes=1)
    with pytest.raises(ValueError, match="the data is used up: every source has had all its passes"):
        taken(mixed([source], lanes=4), 20, workers)


@pytest.mark.parametrize("workers", [3, 4])
def test_more_processes_than_pairs(shards: list[str], workers: int) -> None:
    s = stream(shards, batch_size=2)
    assert same(taken(s, 9, workers), taken(s, 9))


def test_lanes_that_ranks_cannot_share(shards: list[str]) -> None:
    with pytest.raises(ValueError, match="4 lanes cannot be shared by 3 ranks"):
        stream(shards, lanes=4, world_size=3)


def test_loader_leaves_the_global_generators_alone(shards: list[str]) -> None:
    """Dropout draws from them: masks of a resumed run would differ from those of an uninterrupted one."""
    torch.manual_seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        taken(stream(shards), 2, workers)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()


def test_one_of_several_captions(tmp_path: Path) -> None:
    samples = [
        {"png": encode(picture("red", n)), "json": json.dumps({"c": [f"{w} {n}" for w in ("aaa", "bbb")]})}
        for n in range(20)
    ]
    shard = str(write_shard(tmp_path / "0.tar", samples))
    s = stream([shard], captions=Captions("json.c"), batch_size=20)
    drawn = [tuple(batch["text"][:, 1].tolist()) for batch in taken(s, 6)]
    assert {ord("a"), ord("b")} == set(itertools.chain(*drawn))
    assert len(set(drawn)) == 6


def test_fields_with_probabilities(tmp_path: Path) -> None:
    """Which field a sample's caption is from is its own, in each pass anew: a resumed run draws the same."""
    samples = [
        {"png": encode(picture("red", n)), "txt": f"t {n}"} | ({"json": json.dumps({"c": f"c {n}"})} if n % 4 else {})
        for n in range(40)
    ]
    shards = [str(write_shard(tmp_path / f"{n}.tar", samples[n * 10 : n * 10 + 10])) for n in range(4)]
    s = stream(shards, captions=Captions({"json.c": 0.75, "txt": 0.25}), batch_size=20, lanes=2)
    whole = taken(s, 40, 2)
    drawn = [(n, chr(c)) for b in whole for n, c in b["text"][:, :2].tolist()]
    assert {kind for n, kind in drawn if n % 4 == 0} == {"t"}, "it has no other"
    of_both = Counter(kind for n, kind in drawn if n % 4)
    assert of_both["c"] / of_both.total() == pytest.approx(0.75, abs=0.06)
    assert all({kind for m, kind in drawn if m == n} == {"c", "t"} for n in range(40) if n % 4), "anew in each pass"
    assert sum(b["lost"] for b in whole) == 0
    for start in (1, 7, 20):
        assert same(taken(s.starting_at(whole[start - 1]["place"]), 40 - start), whole[start:])


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [default_workers(n) for n in (1, 2, 4, 16, 32)] == [14, 7, 3, 1, 1]
