"""Shards: names, and what is in them."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import braceexpand
from webdataset.tariterators import base_plus_ext

from clipq.data.cache import Cache
from clipq.data.remote import is_url, open_url, require_protocol
from clipq.data.tar import Damage, members

log = logging.getLogger(__name__)

Sample = dict[str, Any]
"""Member extension -> bytes, and `__key__`."""


class LeftOut(NamedTuple):
    """Stands for a sample that lacks a member, or that a filter leaves out."""

    reason: str


LACKING = ("no image", "no caption")
"""Reasons to leave a sample out without a filter: what is wanted of it, in this order."""


class DataError(ValueError):
    """Training cannot go on with this data; the message says which shard and why."""


class BrokenShardError(ValueError):
    """Samples of a shard are missing, for it cannot be read to its end."""


def expand(patterns: str | list[str]) -> list[str]:
    """Shard names that a path, a `{00000..00099}` range, a glob, or a list of these stand for.

    Raises:
        FileNotFoundError: a pattern without a match, or a file that does not exist.
        ValueError: the same shard twice, or no pattern at all.
    """
    names: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in braceexpand.braceexpand(pattern):
            names += _matches(name, pattern)
    if not names:
        raise ValueError("no shards are named: expected a path, a pattern or a list of them")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        often = "twice" if times == 2 else f"{times} times"
        raise ValueError(f"shard {name} is named {often}: each shard counts once a pass")
    return names


def spread(shards: list[str], limit: int | None) -> tuple[list[str], int | None]:
    """Shards, and samples of each, to look at for no more than `limit` samples in all: of every shard its first, or of
    evenly spaced shards where these are more than the samples. None for all samples."""
    if limit is None or not shards:
        return shards, None
    shards = shards[:: -(-len(shards) // limit)]
    return shards, limit // len(shards)


def names_digest(sources: dict[str, list[str]]) -> int:
    """Tells sources apart by their names and the base names and order of their shards, on which the order of samples
    depends. Folders don't count, nor what follows a `?` in an address: data may move, and signatures expire."""
    shards = {name: [re.sub(r"\?.*", "", s).rsplit("/", 1)[-1] for s in named] for name, named in sources.items()}
    names = json.dumps(shards)
    return int.from_bytes(hashlib.blake2b(names.encode(), digest_size=6).digest())


def _matches(name: str, pattern: str) -> list[str]:
    if is_url(name):
        if "*" in name and not name.startswith("pipe:"):
            raise ValueError(f"{name}: patterns with * are for files; name a range, as in {{00000..00099}}.tar")
        return [name]
    path = Path(name).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"{name} is a folder: name its shards, as in {name.rstrip('/')}/*.tar")
    if path.exists():  # before globbing, for names with brackets in them
        return [str(path)]
    files = glob.glob(str(path), recursive=True)  # noqa: PTH207 (patterns may be absolute)
    found = sorted(f for f in files if Path(f).is_file())
    if not found:
        raise FileNotFoundError(f"no shard matches {name!r}" + ("" if name == pattern else f" (from {pattern!r})"))
    return found


def grouped(files: Iterable[dict[str, Any]]) -> Iterator[Sample]:
    """Neighbours of one key as a sample, as webdataset has it; where a member comes again, another sample begins (there
    it is an error)."""
    sample: Sample = {}
    for file in files:
        key, extension = _split(file["fname"])
        if key is None or extension is None or extension.startswith("__"):  # names of our own
            continue
        extension = extension.lower()
        if sample.get("__key__") != key or extension in sample:
            if sample:
                yield sample
            sample = {"__key__": key, "__url__": file["__url__"]}
        sample[extension] = file["data"]
    if sample:
        yield sample


def _split(name: str) -> tuple[str | None, str | None]:
    """A sample's key and the extension, as webdataset splits a name; most without its regular expression."""
    first = name.rfind("/") + 1
    dot = name.find(".", first)
    return (name[:dot], name[dot + 1 :]) if dot > first else base_plus_ext(name)


def log_damage(damage: Damage) -> None:
    log.warning("shard %s: %s", damage.shard, damage.text)


def _open(shard: str, cache: Cache | None) -> Any:
    if not is_url(shard):
        return Path(shard).open("rb", buffering=0)
    return open_url(shard) if cache is None else cache.open(shard)


def read_shard(
    shard: str, *, cache: Cache | None = None, on_damage: Callable[[Damage], None] = log_damage
) -> Generator[Sample]:
    """Samples of a .tar or .tar.gz in the order of the file, members grouped by their key.

    A shard that cannot be opened, is damaged or breaks off ends there; `on_damage` is told, with the number of samples
    read before.
    """
    count = 0
    try:
        with _open(shard, cache) as stream:
            for sample in grouped(members(shard, stream, on_damage)):
                count += 1
                yield sample
        if not count:
            on_damage(Damage(shard, "empty", "it holds no samples"))
    except Exception as error:  # tarfile and the unpackers raise errors of many kinds on damaged files
        text = f"{type(error).__name__}: {error}; {count} samples were read before"
        on_damage(Damage(shard, "damaged", text))


def read_part(
    shard: str,
    wanted: tuple[str, ...],
    *,
    part: int = 0,
    parts: int = 1,
    first: int = 0,
    count: int | None = None,
    cache: Cache | None = None,
    reason: Callable[[Sample], str | None] | None = None,
    on_damage: Callable[[Damage], None] = log_damage,
) -> Iterator[tuple[int, Sample | LeftOut | None]]:
    """(index in the shard, sample) of a shard's samples, in the order of the file.

    Args:
        wanted: member extensions of the image and of the caption, alternatives separated by semicolons; a sample
            without one of each is left out.
        part: of the samples those whose index mod `parts` is this.
        first: and is no less than this.
        count: samples that the shard ought to hold, if that is known; None comes for each that is missing at its end.
        cache: where remote shards are kept.
        reason: why a filter leaves a sample out, None where it does not; sees every member. With a filter, nothing
            comes for samples that are missing: it might have left them out.
        on_damage: as of `read_shard`; also where no sample of the shard has what is wanted.
    """
    names = {"__key__", "__url__", *(name for alternatives in wanted for name in alternatives.split(";"))}
    seen: set[str] = set()
    found, damage, index = False, [], -1

    def damaged(fault: Damage) -> None:
        damage.append(fault)
        on_damage(fault)

    for index, sample in enumerate(read_shard(shard, cache=cache, on_damage=damaged)):
        why = next((lack for lack, w in zip(LACKING, wanted, strict=True) if member(sample, w) is None), None)
        if why is None:
            found = True
        else:
            seen.update(k for k in sample if not k.startswith("__"))
        if index >= first and index % parts == part:
            why = why or (reason(sample) if reason else None)
            yield index, LeftOut(why) if why else {name: value for name, value in sample.items() if name in names}
    if seen and not found:
        on_damage(Damage(shard, "damaged", _not_wanted(wanted, seen)))
    missing = range(index + 1, count or 0)
    if missing and not any(fault.kind == "damaged" for fault in damage):
        text = f"it holds {index + 1:,} samples, where the manifest in its folder says {count:,}"
        on_damage(Damage(shard, "damaged", text))
    if reason is None:
        yield from ((index, None) for index in missing if index >= first and index % parts == part)


def check_members(shards: list[str], wanted: tuple[str, ...], captions: Callable[[Sample], list[str]]) -> None:
    """Looks at the first samples of the first readable shard that is a file, so that a wrong setting is found before
    training.

    What is wrong with shards is told where it is an error: training tells it when it comes to them.

    Args:
        wanted: as in `read_part`.
        captions: gives the captions of a sample, or raises a ValueError that says why there are none.

    Raises:
        DataError: none of 100 samples has what is wanted and a caption, or no shard can be read.
        RemoteError, ValueError: a shard's address is of a kind that cannot be read here.
    """
    for shard in (s for s in shards if is_url(s)):
        require_protocol(shard)
    seen: set[str] = set()
    damage: list[Damage] = []
    for shard in (s for s in shards if not is_url(s)):
        fault = None
        for sample in itertools.islice(read_shard(shard, on_damage=damage.append), 100):
            if all(member(sample, w) is not None for w in wanted):
                try:
                    captions(sample)
                    return
                except ValueError as error:
                    fault = error
            seen.update(k for k in sample if not k.startswith("__"))
        if fault is not None:
            raise DataError(f"shard {shard}: no caption in its first samples: {fault}. Check data.caption.field")
        if seen:
            raise DataError(f"shard {shard}: {_not_wanted(wanted, seen)}")
    if not any(is_url(s) for s in shards):
        for found in damage:
            log_damage(found)
        where = shards[0] if len(shards) == 1 else f"any of {len(shards)} shards, such as {shards[0]}"
        raise DataError(
            f"no sample could be read from {where}: expected .tar or .tar.gz files of images and captions "
            "(see the warnings before)"
        )


def _not_wanted(wanted: tuple[str, ...], seen: set[str]) -> str:
    return (
        f"it has no sample with {' and '.join(wanted)}; its members are: {', '.join(sorted(seen))}. Check data.image "
        "and data.caption.field"
    )


def member(sample: Sample, extensions: str) -> bytes | None:
    """The first member of a sample that has one of the extensions, separated by semicolons."""
    for extension in extensions.split(";"):
        if extension in sample:
            return sample[extension]
    return None


def share_of_lane(
    shards: list[str], *, lane: int, lanes: int, on_damage: Callable[[Damage], None] = log_damage
) -> Iterator[tuple[str, int, Sample]]:
    """Each sample of the shards exactly once over all lanes, for evaluation, as (shard, index in the shard, sample).

    A lane reads no more shards than it must: lanes that are more than the shards take turns with the samples of one,
    and each of these calls `on_damage`.
    """
    first = lane % len(shards)
    sharing = range(first, lanes, len(shards))
    turn = sharing.index(lane)
    for shard in shards[first::lanes]:
        for index, sample in enumerate(read_shard(shard, on_damage=on_damage)):
            if index % len(sharing) == turn:
                yield shard, index, sample
