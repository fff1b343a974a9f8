"""Evaluation, for any number of shards, lanes and samples: nothing is dropped or read twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipq.data.shards as module
from clipq.data.shards import Sample, share_of_lane

quickly = settings(max_examples=60, deadline=None)

counts = st.lists(st.integers(1, 9), min_size=1, max_size=7)
"""Samples of each shard."""
lanes = st.integers(1, 12)


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
