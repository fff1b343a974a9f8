"""What shards hold: sizes of images, lengths of captions, and some samples to look at."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clipq.data.check import Rules, image_header, sample_faults
from clipq.data.filters import is_number, json_record
from clipq.data.parallel import over
from clipq.data.shards import Damage, Sample, member, read_shard

PICKED = 48
"""Samples on the contact sheet."""
Number = TypeVar("Number", int, float)
QUANTILES = (0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)


class Picked(NamedTuple):
    """A sample for the contact sheet."""

    rank: bytes
    """A hash of what sample this is: those with the lowest are a random choice, whatever the order of reading."""
    image: bytes
    """Encoded."""
    caption: str


@dataclass
class Stats:
    """What was counted in some shards. Values are counted, not listed: memory does not grow with the samples."""

    shards: int = 0
    samples: int = 0
    bytes: int = 0
    """Of the files, whole."""
    faults: Counter[str] = field(default_factory=Counter)
    """Samples by kind of fault (`check.KINDS`), and shards under "damaged"."""
    formats: Counter[str] = field(default_factory=Counter)
    width: Counter[int] = field(default_factory=Counter)
    """Pixels, as stored."""
    height: Counter[int] = field(default_factory=Counter)
    short_side: Counter[int] = field(default_factory=Counter)
    aspect: Counter[float] = field(default_factory=Counter)
    """Long side by short side, to a hundredth."""
    caption: Counter[int] = field(default_factory=Counter)
    """Characters of each caption; a sample may have several."""
    json: dict[str, Counter[float]] = field(default_factory=dict)
    """Numeric fields of the `json` member, to three digits."""
    picked: list[Picked] = field(default_factory=list)

    def add(self, other: Stats) -> None:
        """Counts what the other has counted; the order in which this is done changes nothing."""
        self.shards += other.shards
        self.samples += other.samples
        self.bytes += other.bytes
        for name in ("faults", "formats", "width", "height", "short_side", "aspect", "caption"):
            getattr(self, name).update(getattr(other, name))
        for name, numbers in other.json.items():
            self.json.setdefault(name, Counter()).update(numbers)
        self.picked = sorted(self.picked + other.picked)[:PICKED]

    def record(self) -> dict[str, Any]:
        """As JSON holds it: sizes and lengths as quantiles."""
        return {
            "shards": self.shards,
            "samples": self.samples,
            "bytes": self.bytes,
            "formats": dict(self.formats.most_common()),
            "pixels": {name: quantiles(getattr(self, name)) for name in ("width", "height", "short_side")},
            "aspect": quantiles(self.aspect),
            "caption_characters": quantiles(self.caption),
            "json": {name: quantiles(self.json[name]) for name in sorted(self.json)},
            "captions": self.caption.total(),
            "share_of_samples_with_empty_caption": self.faults["bad caption"] / max(1, self.samples),
            "faults": dict(sorted(self.faults.items())),
        }


def quantiles(counts: Counter[Number]) -> dict[str, Number]:
    """Quantile -> the lowest value that at least this share of all values does not exceed; empty without values."""
    total, left = counts.total(), list(QUANTILES)
    found: dict[str, Number] = {}
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        while left and seen >= left[0] * total:
            found[f"{left.pop(0):g}"] = value
    return found


def look(shards: list[str], rules: Rules, *, each: int | None = None, workers: int = 1) -> Generator[Stats]:
    """What is in the first so many samples of each shard, in the order in which they are finished, to be added up."""
    tasks = [(shard, rules, each) for shard in shards]
    with contextlib.closing(over(_look, tasks, workers=workers)) as results:
        for _, stats in results:
            yield stats


def _look(task: tuple[str, Rules, int | None]) -> Stats:
    shard, rules, each = task
    stats = Stats(shards=1, bytes=Path(shard).stat().st_size)
    damage: list[Damage] = []
    with contextlib.closing(read_shard(shard, on_damage=damage.append)) as samples:
        for index, sample in enumerate(itertools.islice(samples, each)):
            _count(stats, sample, f"{Path(shard).name} {index}", rules)
    stats.faults.update({fault.kind for fault in damage})
    return stats


def _count(stats: Stats, sample: Sample, name: str, rules: Rules) -> None:
    stats.samples += 1
    faults = {kind for kind, _ in sample_faults(sample, rules)}
    stats.faults.update(faults)
    captions = [] if faults & {"no caption", "bad caption"} else rules.captions.all(sample)
    stats.caption.update(map(len, captions))
    for field_name, number in json_record(sample).items():
        if is_number(number) and abs(number) < 1e300:  # neither NaN nor an integer beyond any float
            stats.json.setdefault(field_name, Counter())[float(f"{number:.3g}")] += 1
    data = member(sample, rules.image)
    if data is None or "undecodable" in faults:
        return
    width, height, kind = image_header(data)
    stats.formats[kind] += 1
    stats.width[width] += 1
    stats.height[height] += 1
    short, long = sorted((width, height))
    stats.short_side[short] += 1
    stats.aspect[round(long / short, 2)] += 1
    if captions:
        _pick(stats, name, data, captions[0])


def _pick(stats: Stats, name: str, image: bytes, caption: str) -> None:
    rank = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()
    if len(stats.picked) < PICKED or rank < stats.picked[PICKED - 1].rank:
        stats.picked = sorted([*stats.picked, Picked(rank, image, caption)])[:PICKED]
