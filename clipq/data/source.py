"""A source of training data: shards or tables of one kind, and how they are read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from clipq.data import filters
from clipq.data.cache import Cache
from clipq.data.decode import Captions
from clipq.data.faults import Faults
from clipq.data.filters import Filter
from clipq.data.order import Order, Visit
from clipq.data.remote import is_url
from clipq.data.shards import (
    Damage,
    DataError,
    LeftOut,
    Sample,
    check_members,
    member,
    read_part,
    spread,
)
from clipq.data.table import TableShards, read_image, read_tables


@dataclass(frozen=True)
class Source:
    """Shards of one kind, and how they are read."""

    shards: list[str]
    captions: Captions
    image: str = "jpg;jpeg;png;webp"
    weight: float = 1.0
    """Its share of the samples, relative to the weights of the other sources."""
    passes: int | None = None
    """Passes over it at most; None for no end."""
    counts: list[int | None] | None = None
    """Samples of each shard as manifests have it. A shard that cannot be read to its end then shifts no other sample:
    spares come in the places of those that it lacks."""
    setting: str = "data.shards"
    """Which setting names it, for errors."""
    filter: Filter = field(default_factory=Filter)
    cache: Cache | None = None
    """Where remote shards are kept."""
    tables: list[TableShards] | None = None
    """Where the shards are those of tables, in this order."""

    @property
    def name(self) -> str:
        return self.setting.removeprefix("data.sources.")

    def check(self) -> None:
        """Looks at the first samples.

        Raises:
            DataError: they are not what the settings say.
        """
        try:
            for table in self.tables or []:
                table.check()
            if self.tables is None:
                check_members(self.shards, self._wanted, self.captions.all)
            if self._reason is not None:
                filters.require_some(self._some())
        except DataError as error:
            raise DataError(f"{self.setting}: {error}") from error

    def _some(self) -> Iterator[Sample | LeftOut | None]:
        """Samples from all of the data that is in files, as many as are looked at before a run, or more."""
        if self.tables is not None:  # whose shards have rows from anywhere
            numbers = range(len(self.shards))
            yield from (found for n in numbers for _, found in self._filtered(read_tables(self.tables, n)))
            return
        files, each = spread([shard for shard in self.shards if not is_url(shard)], filters.LOOK)
        for shard in files:
            samples = read_part(shard, self._wanted, reason=self._reason, on_damage=lambda _: None)
            yield from (found for _, found in itertools.islice(samples, each))

    def read(
        self, order: Order, faults: Faults, visit: Visit, first: int
    ) -> Iterator[tuple[int, Sample | LeftOut | None]]:
        """(index, sample) of the samples of a visit from an index on; faults are noted and counted."""
        faults.shards += 1

        def damaged(damage: Damage) -> None:
            faults.damage.append(damage)
            if damage.kind == "damaged":
                faults.broken += 1
                faults.last = damage.shard

        if self.tables is not None:
            rows = read_tables(self.tables, visit.shard, part=visit.part, parts=order.parts, first=first)
            return self._filtered(rows)
        return read_part(
            self.shards[visit.shard],
            self._wanted,
            part=visit.part,
            parts=order.parts,
            first=first,
            count=self.counts[visit.shard] if self.counts else None,
            cache=self.cache,
            reason=self._reason,
            on_damage=damaged,
        )

    def image_of(self, sample: Sample) -> bytes:
        """The encoded image of a sample.

        Raises:
            ValueError: a table's file cannot be read.
        """
        if self.tables is not None:
            return read_image(sample)
        data = member(sample, self.image)
        assert data is not None  # read_part lets no other sample through
        return data

    def _filtered(self, rows: Iterator[tuple[int, Sample]]) -> Iterator[tuple[int, Sample | LeftOut]]:
        for index, sample in rows:
            why = self._reason(sample) if self._reason else None
            yield index, LeftOut(why) if why else sample

    @property
    def _wanted(self) -> tuple[str, str]:
        return self.image, self.captions.member

    @functools.cached_property
    def _reason(self) -> Callable[[Sample], str | None] | None:
        """Why the filter leaves a sample out; None where there is no filter."""
        if not self.filter.reasons:
            return None
        return functools.partial(self.filter.reason, image=self.image, captions=self.captions)
