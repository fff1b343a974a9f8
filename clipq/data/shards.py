"""Shards: names, what is in them, and the order in which the lanes of a run read them.

A *lane* is one loader process of one rank. The order of a run is a function of (seed, shards, lanes): passes over the
permuted shards follow one another in one endless list, of which lane l takes the entries l, l + L, l + 2L, … So no
shard is dropped or repeated within a pass, for any number of shards and lanes.
"""

from __future__ import annotations

import glob
import logging
import random
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_iterator

log = logging.getLogger(__name__)

Sample = dict[str, Any]
"""Member extension -> bytes, and `__key__`."""


def expand(patterns: str | list[str]) -> list[str]:
    """Shard names that a path, a `{00000..00099}` range, a glob, or a list of these stand for.

    Raises:
        FileNotFoundError: a pattern without a match, or a file that does not exist.
        ValueError: the same shard twice.
    """
    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in braceexpand.braceexpand(pattern):
            names += _matches(name, pattern)
    twice = {n for n in names if names.count(n) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"shard {min(twice)} is named twice: each shard counts once a pass")
    return names


def _matches(name: str, pattern: str) -> list[str]:
    if name.startswith("pipe:") or "://" in name:
        return [name]
    if glob.has_magic(name):
        found = sorted(glob.glob(str(Path(name).expanduser())))  # noqa: PTH207 (patterns may be absolute)
    else:
        path = Path(name).expanduser()
        if path.is_dir():
            raise FileNotFoundError(f"{name} is a folder: name its shards, as in {name.rstrip('/')}/*.tar")
        found = [str(path)] if path.is_file() else []
    if not found:
        raise FileNotFoundError(f"no shard matches {name!r}" + ("" if name == pattern else f" (from {pattern!r})"))
    return found


def read_shard(shard: str) -> Iterator[Sample]:
    """Samples of a .tar or .tar.gz in the order of the file, members grouped by their key.

    A shard that cannot be opened or breaks off is logged with the number of samples read before, and ends there.
    """
    count = 0
    try:
        with gopen(shard) as stream:
            for sample in group_by_keys(_members(shard, stream)):
                count += 1
                yield sample
    except (OSError, EOFError, tarfile.TarError) as error:
        log.warning("shard %s: %s: %s; %d samples were read before", shard, type(error).__name__, error, count)


def _members(shard: str, stream: Any) -> Iterator[dict[str, Any]]:
    for member in tar_file_iterator(stream):
        member["__url__"] = shard
        yield member


def visits(shards: list[str], *, seed: int, lane: int, lanes: int) -> Iterator[str]:
    """The endless list of shards that a lane reads."""
    position = lane
    while True:
        this_pass, index = divmod(position, len(shards))
        order = np.random.default_rng([seed, this_pass]).permutation(len(shards))
        yield shards[order[index]]
        position += lanes


def shuffled_samples(
    shards: list[str], wanted: tuple[str, ...], *, seed: int, lane: int, lanes: int, buffer: int
) -> Iterator[Sample]:
    """Endless samples of a lane, shuffled within a buffer that each new sample enters at a random place.

    Args:
        wanted: alternatives of member extensions, each separated by semicolons; a sample counts that has one of each.
        buffer: samples held; 1 keeps the order of the shards.

    Raises:
        ValueError: a whole shard held no wanted sample, which would otherwise look like a hang.
    """
    rng = random.Random(f"{seed} {lane} {lanes}")
    held: list[Sample] = []
    for shard in visits(shards, seed=seed, lane=lane, lanes=lanes):
        seen: set[str] = set()
        found = 0
        for sample in read_shard(shard):
            if not all(member(sample, w) is not None for w in wanted):
                seen.update(k for k in sample if not k.startswith("__"))
                continue
            found += 1
            if len(held) < buffer - 1:
                held.append(sample)
            elif held:
                i = rng.randrange(buffer)
                if i < len(held):
                    held[i], sample = sample, held[i]
                yield sample
            else:
                yield sample
        if not found:
            raise ValueError(
                f"shard {shard} has no sample with {' and '.join(wanted)}; its members are: "
                f"{', '.join(sorted(seen)) or 'none'}. Check data.image and data.caption.field"
            )


def member(sample: Sample, extensions: str) -> bytes | None:
    """The first member of a sample that has one of the extensions, separated by semicolons."""
    for extension in extensions.split(";"):
        if extension in sample:
            return sample[extension]
    return None


def share_of_lane(shards: list[str], *, lane: int, lanes: int) -> Iterator[tuple[str, int, Sample]]:
    """Each sample of the shards exactly once over all lanes, for evaluation, as (shard, index in the shard, sample).

    Whole shards are dealt out where there are enough for every lane, else the samples of each shard are.
    """
    by_shard = len(shards) >= lanes
    for number, shard in enumerate(shards):
        if by_shard and number % lanes != lane:
            continue
        for index, sample in enumerate(read_shard(shard)):
            if by_shard or index % lanes == lane:
                yield shard, index, sample
