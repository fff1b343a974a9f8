"""The order of training samples, as a function of (seed, shards, lanes) alone: not of processes, ranks or batch size.

A *lane* reads one shard at a time. Passes over the permuted shards follow one another in an endless list of *visits*,
of which lane l makes those numbered l, l + L, l + 2L, … So no shard is dropped or repeated within a pass, for any
number of shards and lanes. Where lanes outnumber shards, a visit is to every m-th sample of a shard.

A lane shuffles block by block: it gives out the samples of a block in random order while it reads those of the next
into the places that come free. The lanes take turns: sample g of a run is from lane g mod L. Which rank and which
process has a lane changes nothing of this, so a run goes on in the same order with other numbers of either.

Of several sources each has an order of its own, and a lane takes its samples from one or another by their weights.

Samples that a filter leaves out have no place in the order: a lane shuffles and counts those that are left. It does go
over them, so a place in a shard is one among all its samples.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clipq.data.shards import DataError, LeftOut, Sample

USUAL_LANES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
"""Numbers of lanes that many numbers of ranks and of processes divide."""
GOLDEN = (5**0.5 - 1) / 2
SPARES = 16
"""Samples at hand, and then further shards, tried in place of a sample that cannot be used."""
FIRST_BLOCK = 16
"""Samples in a lane's first block. Each block is twice the one before, up to the whole: the first batch comes early."""
MOST_LEFT_OUT = 1_000_000
"""Samples in a row that a lane's filter may leave out: of a large data set it takes days to read all."""


def usual_lanes(shards: int, ranks: int) -> int:
    """Lanes where none are asked for: no more than shards, unless ranks ask for more."""
    lanes = max(n for n in USUAL_LANES if n <= max(1, shards))
    return lanes if lanes % ranks == 0 else ranks * -(-lanes // ranks)


class Visit(NamedTuple):
    """What a lane reads at a time."""

    round: int
    """Number of the pass over all shards."""
    shard: int
    part: int
    """Of the shard's samples those with index mod parts = part."""


class Place(NamedTuple):
    """Where a lane is: in a block that begins at a sample of a visit."""

    visit: int = 0
    """Number of the visit, counted in this lane."""
    index: int = 0
    """Index of the block's first sample in its shard, or of the first of those left out right before it."""
    block: int = 0
    done: int = 0
    """Samples of the block that were given out."""


class Item(NamedTuple):
    """A sample and where it is from."""

    number: int
    """Of the visit, counted in its lane."""
    visit: Visit
    index: int
    sample: Sample | None
    """None where the shard is known to hold one that cannot be read."""
    begins: tuple[int, int]
    """Visit and index from which a lane comes to this sample and to those left out right before it."""
    left_out: tuple[str, ...] = ()
    """Why each of these was left out."""


@dataclass(frozen=True)
class Order:
    """How shards are dealt to lanes, and how a lane shuffles."""

    shards: int
    lanes: int
    seed: int
    shuffle: int
    """Samples in a block; 1 keeps the order of the shards."""
    source: int = 0
    """Number of the source that the shards are of."""
    passes: int | None = None
    """After so many the source is used up; None for no end."""

    @property
    def parts(self) -> int:
        """Visits that a shard is cut into."""
        return -(-self.lanes // self.shards)

    @property
    def visits(self) -> int:
        """Visits in a pass."""
        return self.shards * self.parts

    def visit(self, lane: int, number: int) -> Visit:
        this_round, index = divmod(lane + number * self.lanes, self.visits)
        shard, part = divmod(int(_permutation(self.visits, self.seed, self.source, this_round)[index]), self.parts)
        return Visit(this_round, shard, part)

    def size(self, block: int) -> int:
        return min(self.shuffle, FIRST_BLOCK << min(block, 40))

    def shuffled(self, lane: int, block: int, size: int) -> list[int]:
        """In which order a lane gives out the samples of a block."""
        return np.random.default_rng([self.seed, self.source, lane, block]).permutation(size).tolist()


@functools.lru_cache(maxsize=16)
def _permutation(size: int, seed: int, source: int, this_round: int) -> np.ndarray:
    return np.random.default_rng([seed, source, this_round]).permutation(size)


class UsedUpError(Exception):
    """A source has had all its passes."""


class AllLeftOutError(Exception):
    """A filter leaves out all samples of a source, or more in a row than are worth reading."""

    def __init__(self, source: int, left_out: Iterable[str]) -> None:
        super().__init__(source, left_out)
        self.source, self.left_out = source, Counter(left_out)


Read = Callable[[Visit, int], Iterator[tuple[int, Sample | LeftOut | None]]]


class Lane:
    """The samples of a source in a lane, from a place on.

    Args:
        read: gives (index, sample) of those samples of a visit whose index is at least a given one, in order.
    """

    def __init__(self, order: Order, lane: int, place: Place, read: Read) -> None:
        self.order = order
        self._lane, self._read = lane, read
        self._items = self._all(place.visit, place.index)
        self._block = place.block
        self._left: list[Item | None] = []
        """The block, without what was given out."""
        self._turns: list[int] = []
        self._done = place.done
        self._next: list[Item] = []
        self._begins = place.visit, place.index
        self._opened = False
        self._first = functools.lru_cache(maxsize=SPARES)(self._first_of)

    @property
    def place(self) -> Place:
        return Place(*self._begins, self._block, self._done)

    def draw(self) -> Item:
        """The next sample.

        Raises:
            UsedUpError: there are no more.
            DataError: two passes of visits gave none. It would otherwise look like a hang.
            AllLeftOutError: so would a filter that leaves out all.
        """
        if not self._opened:
            self._open(list(itertools.islice(self._items, self.order.size(self._block))))
            for turn in self._turns[: self._done]:
                self._left[turn] = None
            self._read_ahead()
            self._opened = True
        if self._done >= len(self._left):  # more, where the shards have fewer samples than before a resumption
            if not self._next:
                raise UsedUpError
            self._block += 1
            self._done = 0
            self._begins = self._next[0].begins
            self._open(self._next)
            self._next = []
        turn = self._turns[self._done]
        item = self._left[turn]
        assert item is not None
        self._left[turn] = None
        self._done += 1
        self._read_ahead()
        return item

    def spares(self, item: Item, rng: random.Random) -> Iterator[Item]:
        """Samples that may stand for one that cannot be used, those to try first at first: some of those at hand, which
        keep their places, and the first of each of the next visits."""
        at_hand = [other for other in (*self._left, *self._next) if other is not None and other.sample is not None]
        yield from rng.sample(at_hand, min(len(at_hand), SPARES))
        for number in range(item.number + 1, item.number + 1 + SPARES):
            first = self._first(number)
            if first is not None:
                yield first

    def _first_of(self, number: int) -> Item | None:
        visit = self.order.visit(self._lane, number)
        for index, sample in self._read(visit, 0):
            if sample is not None and not isinstance(sample, LeftOut):
                return Item(number, visit, index, sample, (number, index))
        return None

    def _open(self, items: list[Item]) -> None:
        self._left = list(items)
        self._turns = self.order.shuffled(self._lane, self._block, len(items))

    def _read_ahead(self) -> None:
        wanted = self._done * self.order.size(self._block + 1) // max(1, len(self._left))
        self._next += itertools.islice(self._items, wanted - len(self._next))

    def _all(self, number: int, first: int) -> Iterator[Item]:
        barren = 0
        left_out: list[str] = []
        """Since the last item, and where the first of them is."""
        begins = None
        empty: set[tuple[int, int]] = set()
        """Shards, and their parts, that gave no item since then."""
        for n in itertools.count(number):
            visit, found, given = self.order.visit(self._lane, n), False, False
            if self.order.passes is not None and visit.round >= self.order.passes:
                return
            for index, sample in self._read(visit, first):
                found = True
                if isinstance(sample, LeftOut):
                    left_out.append(sample.reason)
                    begins = begins or (n, index)
                    if len(left_out) >= MOST_LEFT_OUT:
                        raise AllLeftOutError(self.order.source, left_out)
                    continue
                yield Item(n, visit, index, sample, begins or (n, index), tuple(left_out))
                given, left_out, begins = True, [], None
            if given:
                empty.clear()
            elif not first:
                empty.add((visit.shard, visit.part))
            if left_out and len(empty) == self.order.visits:
                raise AllLeftOutError(self.order.source, left_out)
            barren = 0 if found or first else barren + 1
            first = 0
            # twice: the only good visit may come first in one pass and last in the next
            if barren == 2 * self.order.visits:
                raise DataError(f"no sample could be read from {barren} shards in a row (see the warnings before)")


class Mix:
    """A lane of all sources: which of them is next is by weight, spread as evenly as can be.

    Args:
        lanes: of each source.
        weights: of each source, positive; its share of the samples while all have some left.
        seed: sets which comes first.
        numbers: of the lane's samples from here on, counted over all lanes.
    """

    def __init__(self, lanes: list[Lane], weights: list[float], *, seed: int, numbers: Iterator[int]) -> None:
        self.lanes = lanes
        self._weights = weights
        self._start = random.Random(seed).random()
        self._numbers = numbers

    def draw(self) -> tuple[Lane, Item]:
        """The next sample, and the lane that it is from.

        Raises:
            DataError: every source is used up, or one cannot be read.
        """
        # multiples of the golden ratio, whose fractions cover any share of [0, 1) evenly
        at = (self._start + next(self._numbers) * GOLDEN) % 1
        weights = list(self._weights)
        while any(weights):
            ends = list(itertools.accumulate(weights))
            source = bisect.bisect_right(ends, at * ends[-1], hi=max(n for n, w in enumerate(weights) if w))
            lane = self.lanes[source]
            try:
                return lane, lane.draw()
            except UsedUpError:
                # The others share what falls to it, by where in its share the point is. Nothing is kept of this: a
                # resumed run could not know.
                at = (at * ends[-1] - (ends[source] - weights[source])) / weights[source]
                weights[source] = 0.0
        raise DataError("the data is used up: every source has had all its passes")
