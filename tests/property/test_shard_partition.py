"""For any number of shards, lanes and samples: nothing is dropped or read twice, the order is repeatable."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipq.data.shards as module
from clipq.data.shards import Sample, share_of_lane, shuffled_samples, visits

quickly = settings(max_examples=60, deadline=None)

counts = st.lists(st.integers(1, 9), min_size=1, max_size=7)
"""Samples of each shard."""
lanes = st.integers(1, 12)
seeds = st.integers(0, 2**63 - 1)


@pytest.fixture(autouse=True, scope="module")
def shards_without_files() -> Iterator[None]:
    """A shard is named `<number>:<samples>`, and its samples have a text and what is no sample between them."""

    def read(name: str, *, on_damage: object = None) -> Iterator[Sample]:
        for n in range(int(name.split(":")[1])):
            yield {"__key__": f"{name}/{n}", "__url__": name, "txt": b"x"}
            yield {"__key__": f"{name}/{n} without text", "__url__": name, "jpg": b"x"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "read_shard", read)
        yield


def named(samples: list[int]) -> list[str]:
    return [f"{number}:{count}" for number, count in enumerate(samples)]


@quickly
@given(counts, lanes, seeds, st.integers(1, 4))
def test_each_pass_visits_each_shard_once(samples: list[int], lanes: int, seed: int, passes: int) -> None:
    shards = named(samples)
    total = passes * len(shards)
    # the endless list, put together again from what the lanes read
    each = [visits(shards, seed=seed, lane=lane, lanes=lanes) for lane in range(lanes)]
    one_after_another = [next(each[position % lanes]) for position in range(total)]
    for first in range(0, total, len(shards)):
        assert sorted(one_after_another[first : first + len(shards)]) == sorted(shards)
    assert one_after_another == list(itertools.islice(visits(shards, seed=seed, lane=0, lanes=1), total))


@quickly
@given(seeds)
def test_passes_and_seeds_differ(seed: int) -> None:
    shards = named([1] * 40)
    order = list(itertools.islice(visits(shards, seed=seed, lane=0, lanes=1), 80))
    other = list(itertools.islice(visits(shards, seed=seed + 1, lane=0, lanes=1), 40))
    assert order[:40] != order[40:]
    assert other not in (order[:40], order[40:], shards)


@quickly
@given(counts, lanes, seeds, st.integers(1, 30), st.integers(0, 120), st.data())
def test_a_lane_yields_the_samples_of_its_visits(
    samples: list[int], lanes: int, seed: int, buffer: int, count: int, data: st.DataObject
) -> None:
    shards, lane = named(samples), data.draw(st.integers(0, lanes - 1))
    options = {"seed": seed, "lane": lane, "lanes": lanes}
    stream = shuffled_samples(shards, ("txt",), buffer=buffer, **options)
    read = [s["__key__"] for s in itertools.islice(stream, count)]
    # What has come out is of the first `count` and those that the buffer holds, each as often as it was read.
    source = (f"{v}/{n}" for v in visits(shards, **options) for n in range(int(v.split(":")[1])))
    seen = list(itertools.islice(source, count + buffer - 1))
    assert not Counter(read) - Counter(seen)
    # Sample i leaves the buffer no earlier than it may.
    for out, key in enumerate(read):
        assert key in seen[: out + buffer]
    if buffer == 1:
        assert read == seen
    again = shuffled_samples(shards, ("txt",), buffer=buffer, **options)
    assert read == [s["__key__"] for s in itertools.islice(again, count)]


@quickly
@given(counts, lanes)
def test_evaluation_sees_each_sample_once(samples: list[int], lanes: int) -> None:
    shards = named(samples)
    shares = [list(share_of_lane(shards, lane=lane, lanes=lanes)) for lane in range(lanes)]
    seen = [(shard, index) for share in shares for shard, index, _ in share]
    assert Counter(seen) == {(s, i): 1 for s, count in zip(shards, samples, strict=True) for i in range(2 * count)}
    for share in shares:
        for shard, index, sample in share:
            assert sample["__key__"].startswith(f"{shard}/{index // 2}")


@quickly
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 30))
def test_shares_are_even(shards: int, samples: int, lanes: int) -> None:
    """No lane has more than twice its share and a sample, where shards are of equal length."""
    names = named([samples] * shards)
    share = [sum(1 for _ in share_of_lane(names, lane=lane, lanes=lanes)) for lane in range(lanes)]
    if lanes >= shards:
        assert max(share) <= 2 * (2 * samples * shards / lanes) + 1
    else:
        assert max(share) - min(share) <= 2 * samples
