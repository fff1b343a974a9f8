"""What of the data could not be used: counted, and bounded."""

from __future__ import annotations

from dataclasses import dataclass

from clipq.data.shards import DataError

GRACE = 5
"""Faults of a kind that every run may have: one in the first ten samples is no sign of anything."""


@dataclass
class Faults:
    """Counts of a loader process, or of a rank."""

    samples: int = 0
    """That were asked for."""
    unreadable: int = 0
    """Of these, in whose place another came."""
    shards: int = 0
    """That were opened, each once a visit."""
    broken: int = 0
    """Of these, that are missing, damaged or cut short."""
    last: str = ""
    """The last fault, in words."""

    def taken(self) -> Faults:
        """What was counted so far; counting begins anew."""
        taken = Faults(**vars(self))
        vars(self).update(vars(Faults()))
        return taken

    def add(self, other: Faults) -> None:
        self.samples += other.samples
        self.unreadable += other.unreadable
        self.shards += other.shards
        self.broken += other.broken
        self.last = other.last or self.last

    def check(self, most: float) -> None:
        """Ends a run that would train on what little of its data can be read.

        Args:
            most: share of the samples, and of the shards, that may be lost.

        Raises:
            DataError: more are lost.
        """
        for what, lost, of in (("samples", self.unreadable, self.samples), ("shards", self.broken, self.shards)):
            if lost > GRACE + most * of:
                raise DataError(
                    f"{lost:,} of {of:,} {what} could not be read, the last of them {self.last} (see the warnings "
                    f"before). Mend the data, or set data.max_lost, now {most:g}, to the share that may be lost"
                )
