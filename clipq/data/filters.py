"""Which samples a run trains on: those that a filter leaves out never come into the order."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from clipq.data.decode import Captions, stored_size
from clipq.data.shards import LACKING, DataError, LeftOut, Sample, member

LOOK = 10_000
"""Samples of which one has to be left, before a run begins."""


class Range(NamedTuple):
    """Bounds of a number, both within."""

    low: float = -math.inf
    high: float = math.inf

    def has(self, number: float) -> bool:
        return self.low <= number <= self.high


@dataclass(frozen=True)
class Filter:
    """What a sample has to be like. What cannot be read (an image without a header, a caption that is not UTF-8) is
    not a filter's to judge."""

    min_size: int | None = None
    """Pixels of the short side, at least."""
    max_aspect: float | None = None
    """Long side by short side, at most."""
    caption_length: Range | None = None
    """Characters of a caption; a sample needs one such caption."""
    json: Mapping[str, Range] = field(default_factory=dict)
    """Of the `json` member: field -> where its number lies."""

    @functools.cached_property
    def reasons(self) -> tuple[str, ...]:
        """All reasons that there are for leaving a sample out, named as the settings; of several that hold for a sample
        the first counts. None where there is no filter."""
        fields = (reason for name in self.json for reason in (_missing(name), _outside(name)))
        sizes = (name for name in ("caption_length", "min_size", "max_aspect") if getattr(self, name) is not None)
        return (*fields, *sizes)

    def fits(self, caption: str) -> bool:
        return self.caption_length is None or self.caption_length.has(len(caption))

    def reason(self, sample: Sample, image: str, captions: Captions) -> str | None:
        """Why a sample is left out; None where it is not.

        Args:
            image: extensions of the image member.
        """
        if self.json:
            record = json_record(sample)
            for name, bounds in self.json.items():
                number = record.get(name)
                if not is_number(number):
                    return _missing(name)
                if not bounds.has(number):  # nor is NaN
                    return _outside(name)
        if self.caption_length is not None and not self._has_caption(sample, captions):
            return "caption_length"
        if self.min_size is not None or self.max_aspect is not None:
            size = stored_size(member(sample, image) or b"")
            if size is None:
                return None
            short, long = sorted(size)
            if self.min_size is not None and short < self.min_size:
                return "min_size"
            if self.max_aspect is not None and long > self.max_aspect * short:
                return "max_aspect"
        return None

    def _has_caption(self, sample: Sample, captions: Captions) -> bool:
        try:
            written = captions.written(sample)
        except ValueError:
            return True
        return any(self.fits(caption) for caption in written or [""])


@functools.cache
def _missing(name: str) -> str:
    return f"json.{name}.missing"


@functools.cache
def _outside(name: str) -> str:
    return f"json.{name}"


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def json_record(sample: Sample) -> dict[str, Any]:
    """What the `json` member holds; nothing where there is none that can be read."""
    try:
        record = json.loads(sample.get("json", b""))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def require_some(samples: Iterable[Sample | LeftOut | None]) -> None:
    """Looks for a sample that is not left out, so that a filter that is too strict is found before training.

    Args:
        samples: some from all of the data.

    Raises:
        DataError: each of the first `LOOK` is left out.
    """
    left_out = Counter[str]()
    for found in itertools.islice(samples, LOOK):
        if not isinstance(found, LeftOut):
            return
        left_out[found.reason] += 1
    if left_out:
        raise DataError(all_left_out(left_out))


def all_left_out(left_out: Counter[str]) -> str:
    """The message."""
    if left_out.keys() <= set(LACKING):
        return (
            f"none of {left_out.total():,} samples has an image and a caption: {told(left_out)}. Check data.image and "
            "data.caption.field"
        )
    return (
        f"the filter leaves out all of {left_out.total():,} samples: {told(left_out)}. Loosen data.filter, or "
        "the filter of the source; clipq-data stats shows what samples are like"
    )


def told(left_out: Counter[str]) -> str:
    """Reasons and how often each held, the most frequent first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in left_out.most_common() if count)
