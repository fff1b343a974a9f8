"""What of the data was not used: counted, and bounded where it could not be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from clipq.data.shards import DataError, log_damage
from clipq.data.tar import Damage

GRACE = 5
"""Faults of a kind that every run may have, unless none may be lost: one in the first ten samples is no sign of
anything."""

RECENT_SAMPLES, RECENT_SHARDS = 100_000, 1000
"""Counts that become larger are halved: an old run has to notice too that its data have gone."""


@dataclass
class Faults:
    """Counts of a loader process, or of a rank."""

    samples: int = 0
    """That were asked for."""
    unreadable: int = 0
    """Of these, in whose place another came."""
    missing: int = 0
    """Samples of broken shards, as far as manifests tell, in whose place others came."""
    shards: int = 0
    """That were opened, each once a visit."""
    broken: int = 0
    """Of these, that are missing, damaged or cut short."""
    last: str = ""
    """The last fault, in words."""
    filtered: Counter[str] = field(default_factory=Counter)
    """Samples that were left out, by reason. They are no faults."""
    sources: Counter[str] = field(default_factory=Counter)
    """Samples that were asked for, by source."""
    damage: list[Damage] = field(default_factory=list)
    """What is wrong with shards, each time that one was opened."""

    @property
    def total(self) -> int:
        return self.unreadable + self.missing + self.broken

    def taken(self) -> Faults:
        """What was counted so far; counting begins anew."""
        taken = Faults(**vars(self))
        vars(self).update(vars(Faults()))
        return taken

    def add(self, other: Faults) -> None:
        for name in ("samples", "unreadable", "missing", "shards", "broken"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.filtered.update(other.filtered)
        self.last = other.last or self.last

    def check(self, most: float) -> None:
        """Ends a run that would train on what little of its data can be read. Of long runs the recent past counts.

        Args:
            most: share of the samples, and of the shards, that may be lost.

        Raises:
            DataError: more are lost.
        """
        if self.samples > RECENT_SAMPLES:
            self.samples, self.unreadable = self.samples // 2, self.unreadable // 2
        if self.shards > RECENT_SHARDS:
            self.shards, self.broken = self.shards // 2, self.broken // 2
        for what, lost, of in (("samples", self.unreadable, self.samples), ("shards", self.broken, self.shards)):
            if lost > (GRACE if most else 0) + most * of:
                raise DataError(
                    f"{lost:,} of the last {of:,} {what} could not be read, at last {self.last} (see the warnings): "
                    f"mend the data, or set data.max_lost, now {most:g}, to the share that may be lost"
                )


class Named:
    """Names damaged shards in the log, each once: a pass after the other, and several lanes, may come to it."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, ...]] = set()

    def add(self, found: list[Damage]) -> None:
        for damage in found:
            # the words of an error may change with each try
            key = damage[:2] if damage.kind == "damaged" else damage
            if key not in self._seen:
                self._seen.add(key)
                log_damage(damage)
