"""What is wrong with shards, before a run finds it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import braceexpand
import numpy as np
from PIL import Image

from clipq.data.decode import MAX_PIXELS, Captions, decode_rgb
from clipq.data.index import INDEX, Entry, read_counts, read_index, sha256_of
from clipq.data.parallel import over
from clipq.data.remote import is_url
from clipq.data.shards import Damage, Sample, expand, member, read_shard

KINDS = (
    *("missing", "empty", "not a tar", "damaged", "large member", "fewer samples", "more samples", "checksum differs"),
    *("no image", "no caption", "bad caption", "undecodable", "path outward", "same key"),
)


class Fault(NamedTuple):
    """Something wrong with a shard, or with some of its samples."""

    shard: str
    kind: str
    """One of `KINDS`."""
    text: str
    """A sentence; where samples are at fault, about the first of them."""
    count: int = 1
    """Samples at fault, or 1."""


@dataclass(frozen=True)
class Rules:
    """What is expected of samples."""

    image: str = "jpg;jpeg;png;webp"
    captions: Captions = field(default_factory=Captions)
    decode: bool = False
    """Decode every image, not its header alone."""
    max_member: int = 100 * 2**20
    """Bytes. Above `tar.MAX_MEMBER`, a member is not read at all, whatever this says."""


class Checked(NamedTuple):
    """A shard after its check."""

    faults: list[Fault]
    keys: np.ndarray
    """[samples] uint64, a hash of each key in order."""


class _Task(NamedTuple):
    shard: str
    rules: Rules
    entry: Entry | None
    count: int | None


def find(patterns: list[str]) -> tuple[list[str], list[Fault]]:
    """The shards that patterns stand for, and a fault for each that is named, not found by a glob, and does not exist,
    and for each that an index in their folders has and that does not exist.

    Raises:
        FileNotFoundError, ValueError: as `expand`, but for files that do not exist.
    """
    names = [name for pattern in patterns for name in braceexpand.braceexpand(pattern)]
    missing = [n for n in names if not re.search(r"[*?\[]", n) and not is_url(n) and not Path(n).expanduser().exists()]
    there = [n for n in names if n not in set(missing)]
    shards = expand(there) if there or not missing else []
    faults = [Fault(name, "missing", "no such file") for name in missing]
    for folder in dict.fromkeys(Path(s).parent for s in shards):
        lost = [str(folder / n) for n in sorted(read_index(folder)) if not (folder / n).exists()]
        faults += [Fault(s, "missing", f"{INDEX} has it, but there is no such file") for s in lost if s not in missing]
    return shards, faults


def check_shards(shards: list[str], rules: Rules, *, workers: int = 1) -> Generator[tuple[str, Checked]]:
    """(shard, faults and keys) of each in the order in which they are finished; compared with the index of its folder,
    or else with the number of samples that another manifest tells.

    Raises:
        ValueError: a manifest is malformed.
    """
    index = functools.cache(read_index)
    entries = [index(Path(s).parent).get(Path(s).name) for s in shards]
    tasks = [_Task(s, rules, e, n) for s, e, n in zip(shards, entries, read_counts(shards), strict=True)]
    with contextlib.closing(over(_check, tasks, workers=workers)) as results:
        for task, checked in results:
            yield task.shard, checked


def _check(task: _Task) -> Checked:
    fault = _unreadable(task.shard)
    if fault:
        return Checked([fault], np.empty(0, np.uint64))
    keys = bytearray()
    counts, first, damage = Counter[str](), dict[str, str](), dict[str, Damage]()

    def note(fault: Damage) -> None:
        damage.setdefault(fault.kind, fault)

    for sample in read_shard(task.shard, on_damage=note):
        keys += hashlib.blake2b(sample["__key__"].encode("utf-8", "surrogateescape"), digest_size=8).digest()
        for kind, text in sample_faults(sample, task.rules):
            counts[kind] += 1
            first.setdefault(kind, text)
    samples = len(keys) // 8
    faults = [Fault(*fault) for kind, fault in damage.items() if kind != "empty"]
    faults += [Fault(task.shard, kind, first[kind], count) for kind, count in counts.items()]
    against = None if "damaged" in damage else _against_manifest(task, samples)
    return Checked(([against] if against else []) + faults, np.frombuffer(bytes(keys), np.uint64))


def _unreadable(shard: str) -> Fault | None:
    """Why a shard is not to be read at all."""
    try:
        with Path(shard).open("rb") as stream:
            start = stream.read(12)
    except OSError as error:
        return Fault(shard, "missing", f"it cannot be opened: {error.strerror}")
    if not start:
        return Fault(shard, "empty", "the file has no bytes")
    try:
        tarfile.open(shard).close()
    except Exception as error:  # the unpackers raise errors of many kinds
        return Fault(shard, "not a tar", f"it begins with {start!r}: {' '.join(str(error).split())[:100]}")
    return None


def _against_manifest(task: _Task, samples: int) -> Fault | None:
    """The one fault that says most: where samples are missing, the checksum differs too."""
    if not samples:
        return Fault(task.shard, "empty", "it holds no samples, the members of which are named KEY.EXTENSION")
    if task.count is not None and samples != task.count:
        kind = "fewer samples" if samples < task.count else "more samples"
        return Fault(task.shard, kind, f"it holds {samples:,}, where the manifest says {task.count:,}")
    if task.entry is None:
        return None
    size = Path(task.shard).stat().st_size
    if size != task.entry.bytes:
        text = f"it has {size:,} bytes, where {INDEX} says {task.entry.bytes:,}"
        return Fault(task.shard, "checksum differs", text)
    if sha256_of(task.shard) != task.entry.sha256:
        return Fault(task.shard, "checksum differs", f"its sha256 is not the one of {INDEX}: bytes have changed since")
    return None


def sample_faults(sample: Sample, rules: Rules) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of all that is wrong with a sample."""
    key = sample["__key__"]
    if key.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", key):
        yield "path outward", f"key {key!r} leads out of the folder that an archive is unpacked to"
    size, largest = max((len(data), name) for name, data in sample.items())
    if size > rules.max_member:
        yield "large member", f"sample {key}: its {largest} has {size:,} bytes"
    data = member(sample, rules.image)
    if data is None:
        yield "no image", f"sample {key} has no {rules.image}; its members are {_members(sample)}"
    else:
        try:
            image_header(data)
            if rules.decode:
                decode_rgb(data)
        except ValueError as error:
            yield "undecodable", f"sample {key}: {error}"
    if member(sample, rules.captions.member) is None:
        yield "no caption", f"sample {key} has no {rules.captions.member}; its members are {_members(sample)}"
        return
    try:
        rules.captions.all(sample)
    except ValueError as error:
        yield "bad caption", str(error)


def _members(sample: Sample) -> str:
    return ", ".join(sorted(name for name in sample if not name.startswith("__")))


def image_header(data: bytes) -> tuple[int, int, str]:
    """Width and height in pixels as stored, before EXIF turns them, and Pillow's name of the format.

    Raises:
        ValueError: no image that `decode_rgb` would take, as far as its header tells.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is told below
            image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        known = f"not an image of a known format ({len(data)} bytes, at first {data[:12]!r})"
        raise ValueError(known) from error
    if image.width * image.height > MAX_PIXELS or image.format in ("EPS", None):
        raise ValueError(f"{image.format} of {image.width} x {image.height} pixels is not accepted")
    return image.width, image.height, str(image.format)


def same_keys(keys: dict[str, np.ndarray]) -> list[Fault]:
    """A fault for each pair of shards with keys in common: a shard, and the first that has them, which may be itself.

    Beside the keys, this takes 8 bytes for each, and 20 for each that is there twice.

    Args:
        keys: shard -> hashes of its keys, in the order of the shards.
    """
    twice = _twice(list(keys.values()))
    if not twice.size:
        return []
    shards = list(keys)
    owner, place = np.full(twice.size, -1, np.int32), np.zeros(twice.size, np.int64)
    faults = []
    for number, own in enumerate(keys.values()):
        at = np.minimum(np.searchsorted(twice, own), twice.size - 1)
        here = np.flatnonzero(twice[at] == own)
        at, firsts = at[here], np.unique(at[here], return_index=True)[1]
        new = firsts[owner[at[firsts]] < 0]
        owner[at[new]], place[at[new]] = number, here[new]
        again = np.setdiff1d(np.arange(here.size), new)
        for other in np.unique(owner[at[again]]):
            found = again[owner[at[again]] == other]
            where = "the shard itself" if other == number else shards[other]
            mine, theirs = here[found[0]], place[at[found[0]]]
            text = f"keys that are in {where} too: sample {mine}, from 0, has that of sample {theirs} there"
            faults.append(Fault(shards[number], "same key", text, found.size))
    return faults


def _twice(keys: list[np.ndarray]) -> np.ndarray:
    """The hashes that are there more than once, sorted."""
    hashes = np.concatenate([np.empty(0, np.uint64), *keys])
    hashes.sort()
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
