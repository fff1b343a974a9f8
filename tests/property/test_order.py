"""For any number of shards, samples, lanes, ranks and loader processes: nothing is dropped or read twice, and the order
is the same from every place on."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from clipq.data.order import AllLeftOutError, Item, Lane, Order, Place, Visit, usual_lanes
from clipq.data.shards import DataError, LeftOut, Sample

quickly = settings(max_examples=80, deadline=None)
counts = st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any)
"""Samples of each shard; some have none."""
lane_counts = st.integers(1, 12)
seeds = st.integers(0, 2**63 - 1)
shuffles = st.integers(1, 40)


def lane_of(samples: list[int], order: Order, lane: int, place: Place | None = None) -> Lane:
    """A lane over shards without files: sample n of shard s is {"id": (s, n)}."""

    def read(visit: Visit, first: int) -> Iterator[tuple[int, Sample]]:
        for n in range(first, samples[visit.shard]):
            if n % order.parts == visit.part:
                yield n, {"id": (visit.shard, n)}

    return Lane(order, lane, place or Place(), read)


def drawn(lane: Lane, count: int) -> list[tuple[int, int, int]]:
    """(pass, shard, index) of the next samples."""
    items: list[Item] = [lane.draw() for _ in range(count)]
    assert all(item.sample["id"] == (item.visit.shard, item.index) for item in items)
    return [(item.visit.round, item.visit.shard, item.index) for item in items]


@quickly
@given(st.integers(1, 9), lane_counts, seeds, st.integers(1, 4))
def test_each_pass_visits_each_part_of_each_shard_once(shards: int, lanes: int, seed: int, passes: int) -> None:
    order = Order(shards, lanes, seed, 1)
    whole = {(s, p) for s in range(shards) for p in range(order.parts)}
    assert order.visits == len(whole)
    # the endless list, put together again from what the lanes visit
    endless = [order.visit(position % lanes, position // lanes) for position in range(passes * len(whole))]
    for number in range(passes):
        this_pass = endless[number * len(whole) : (number + 1) * len(whole)]
        assert {v.round for v in this_pass} == {number}
        assert {(v.shard, v.part) for v in this_pass} == whole


@quickly
@given(seeds)
def test_passes_and_seeds_differ(seed: int) -> None:
    order, other = Order(40, 1, seed, 1), Order(40, 1, seed + 1, 1)
    first, second = ([order.visit(0, n).shard for n in range(at, at + 40)] for at in (0, 40))
    assert first != second
    assert [other.visit(0, n).shard for n in range(40)] not in (first, second, list(range(40)))


@quickly
@given(counts, lane_counts, seeds, shuffles, st.data())
def test_a_lane_gives_out_its_visits_block_by_block(
    samples: list[int], lanes: int, seed: int, shuffle: int, data: st.DataObject
) -> None:
    order, lane = Order(len(samples), lanes, seed, shuffle), data.draw(st.integers(0, lanes - 1))
    one_by_one = Order(len(samples), lanes, seed, 1)
    try:
        read = drawn(lane_of(samples, one_by_one, lane), 150)
        found = drawn(lane_of(samples, order, lane), 150)  # reads ahead
    except DataError:
        return  # hardly a sample falls to this lane
    assert [r[:2] for r in read] == sorted((r[:2] for r in read), key=[r[:2] for r in read].index)
    at = 0
    for block in itertools.count():
        size = order.size(block)
        if at + size > 150:
            break
        assert Counter(found[at : at + size]) == Counter(read[at : at + size]), "a block is a block of what is read"
        at += size


@quickly
@given(counts, lane_counts, seeds, shuffles, st.integers(0, 120), st.data())
def test_a_lane_goes_on_from_its_place(
    samples: list[int], lanes: int, seed: int, shuffle: int, start: int, data: st.DataObject
) -> None:
    order, lane = Order(len(samples), lanes, seed, shuffle), data.draw(st.integers(0, lanes - 1))
    first = lane_of(samples, order, lane)
    try:
        drawn(first, start)
        place = first.place
        rest = drawn(first, 60)
    except DataError:
        return  # hardly a sample falls to this lane
    again = lane_of(samples, order, lane, Place(*place))
    assert again.place == place
    assert drawn(again, 60) == rest


def filtered_lane(samples: list[int], order: Order, lane: int, keep: int, place: Place | None = None) -> Lane:
    """As `lane_of`, with one sample of `keep` left, by chance; the reason of each other says which it is."""

    def read(visit: Visit, first: int) -> Iterator[tuple[int, Sample | LeftOut]]:
        for n in range(first, samples[visit.shard]):
            if n % order.parts == visit.part:
                kept = random.Random(f"{visit.shard} {n}").randrange(keep) == 0
                yield n, {} if kept else LeftOut(f"{visit.round} {visit.shard} {n}")

    return Lane(order, lane, place or Place(), read)


def with_left_out(lane: Lane, count: int) -> list[tuple[str, ...]]:
    """The next samples, each after those left out before it."""
    items = [lane.draw() for _ in range(count)]
    return [(*item.left_out, f"{item.visit.round} {item.visit.shard} {item.index}") for item in items]


@quickly
@given(counts, lane_counts, seeds, shuffles, st.integers(1, 12), st.integers(0, 60), st.data())
def test_a_lane_with_a_filter_goes_on_from_its_place(
    samples: list[int], lanes: int, seed: int, shuffle: int, keep: int, start: int, data: st.DataObject
) -> None:
    """What is left out is told with the sample after it, once, wherever the run was stopped."""
    order, lane = Order(len(samples), lanes, seed, shuffle), data.draw(st.integers(0, lanes - 1))
    first = filtered_lane(samples, order, lane, keep)
    try:
        with_left_out(first, start)
        place = first.place
        rest = with_left_out(first, 30)
        one_by_one = Order(len(samples), lanes, seed, 1)
        told = list(itertools.chain(*with_left_out(filtered_lane(samples, one_by_one, lane, keep), 20)))
        unfiltered = drawn(lane_of(samples, one_by_one, lane), len(told))
    except (DataError, AllLeftOutError):
        return  # hardly a sample falls to this lane
    again = filtered_lane(samples, order, lane, keep, Place(*place))
    assert again.place == place
    assert with_left_out(again, 30) == rest
    assert told == [" ".join(map(str, read)) for read in unfiltered]


@quickly
@given(counts, lane_counts, seeds, st.data())
def test_a_lane_of_which_all_is_left_out_ends(samples: list[int], lanes: int, seed: int, data: st.DataObject) -> None:
    order, lane = Order(len(samples), lanes, seed, 4), data.draw(st.integers(0, lanes - 1))

    def read(visit: Visit, first: int) -> Iterator[tuple[int, LeftOut]]:
        for n in range(first, samples[visit.shard]):
            if n % order.parts == visit.part:
                yield n, LeftOut("all")

    with pytest.raises((DataError, AllLeftOutError)) as error:
        Lane(order, lane, Place(), read).draw()
    if isinstance(error.value, AllLeftOutError):
        assert error.value.left_out["all"] >= sum(samples), "no shard was passed over"


@quickly
@given(counts, lane_counts, seeds, shuffles)
def test_a_pass_holds_every_sample_once(samples: list[int], lanes: int, seed: int, shuffle: int) -> None:
    order = Order(len(samples), lanes, seed, shuffle)
    assume(min(samples) >= order.parts)
    found: Counter[tuple[int, int, int]] = Counter()
    for lane in range(lanes):
        stream = lane_of(samples, order, lane)
        # far enough that all of two passes has come out, of the lane's last block too
        found.update(drawn(stream, 2 * max(samples) * order.visits + 4 * shuffle))
    for number in (0, 1):
        this_pass = {key: n for key, n in found.items() if key[0] == number}
        assert this_pass == {(number, s, n): 1 for s, count in enumerate(samples) for n in range(count)}


def test_blocks_grow_so_that_the_first_batch_comes_early() -> None:
    order = Order(4, 2, 0, 1000)
    assert [order.size(n) for n in range(8)] == [16, 32, 64, 128, 256, 512, 1000, 1000]
    opened = Counter()

    def read(visit: Visit, first: int) -> Iterator[tuple[int, Sample]]:
        for n in range(10_000):
            opened["read"] += 1
            yield n, {}

    lane = Lane(order, 0, Place(), read)
    lane.draw()
    assert opened["read"] <= 16 + 2
    for _ in range(5000):
        lane.draw()
        assert len(lane._next) + sum(item is not None for item in lane._left) <= 1000


def test_shuffling_is_thorough() -> None:
    """No trace of the order of a shard is left in a block, and a batch is of many shards."""
    order = Order(64, 32, 5, 512)
    stream = lane_of([2000] * 64, order, 3)
    drawn(stream, 16 + 32 + 64 + 128 + 256)
    block = [index for _, _, index in drawn(stream, 512)]
    assert abs(np.corrcoef(block, np.arange(512))[0, 1]) < 0.15
    neighbours = np.abs(np.diff(block))
    assert neighbours.mean() == pytest.approx(512 / 3, rel=0.15), "of two places drawn independently"


def test_nothing_is_left_of_the_order_of_files() -> None:
    """In the blocks of all lanes over four passes; and each shard comes in an order of its own in each pass."""
    samples, order, growing = [300] * 24, Order(24, 8, 3, 256), 16 + 32 + 64 + 128
    correlations: list[float] = []
    served: dict[tuple[int, int], list[int]] = {}
    for lane in range(8):
        count = growing + 14 * 256
        found = drawn(lane_of(samples, order, lane), count)
        read = {at: n for n, at in enumerate(drawn(lane_of(samples, Order(24, 8, 3, 1), lane), count))}
        for at in range(growing, count, 256):
            places = [read[sample] for sample in found[at : at + 256]]
            correlations.append(np.corrcoef(places, np.arange(256))[0, 1])  # of ranks: a block is read without gaps
        for number, shard, index in found:
            served.setdefault((shard, number), []).append(index)
    assert abs(np.mean(correlations)) < 0.02, "112 of about 0 +- 1/16"
    assert np.abs(correlations).max() < 0.25
    whole = {at: indices for at, indices in served.items() if len(indices) == 300}
    assert len(whole) > 80
    for (shard, number), indices in whole.items():
        assert np.mean(np.diff(indices) == 1) < 0.06, "of neighbours in the file few are neighbours"
        again = whole.get((shard, number + 1))
        if again is not None:
            assert np.mean(np.array(indices) == np.array(again)) < 0.05


def test_usual_lanes() -> None:
    assert [usual_lanes(n, 1) for n in (1, 5, 6, 15, 47, 1000)] == [1, 4, 6, 12, 32, 96]
    assert [usual_lanes(15, ranks) for ranks in (2, 3, 5, 8, 64)] == [12, 12, 15, 16, 64]


def test_nothing_to_read_is_told() -> None:
    with pytest.raises(DataError, match="from 12 shards in a row"):
        lane_of([0] * 6, Order(6, 2, 0, 8), 1).draw()
