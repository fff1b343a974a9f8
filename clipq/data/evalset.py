"""Evaluation data: every image exactly once over all ranks and loader processes, none dropped in silence."""

from __future__ import annotations

import io
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from clipq.data.decode import decode_pil
from clipq.data.shards import BrokenShardError, Damage, Sample, log_damage, member, share_of_lane

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass
class EvalFaults:
    """What could not be evaluated."""

    failed: int = 0
    """Images."""
    broken: set[str] = field(default_factory=set)
    """Shards that could not be read to their end. Several lanes may read the same."""

    def add(self, other: EvalFaults) -> None:
        self.failed += other.failed
        self.broken |= other.broken

    @classmethod
    def of_all(cls, ranks: list[EvalFaults]) -> EvalFaults:
        whole = cls()
        for rank in ranks:
            whole.add(rank)
        return whole

    def metrics(self) -> dict[str, int]:
        return {"failed": self.failed, "broken_shards": len(self.broken)}


class Source(Protocol):
    """Where evaluation samples come from."""

    @property
    def settings(self) -> tuple[str, ...]:
        """What it was made of, by the names of a task's settings: for messages about samples at fault."""
        ...

    def share(self, lane: int, lanes: int) -> Iterator[tuple[str, bytes, Any]]:
        """(name, encoded image, target) of each sample that falls to this lane. A ValueError target marks a fault, a
        BrokenShardError one that is no sample but a shard of which samples are missing."""
        ...


class _Broken:
    """Shards that cannot be read to their ends."""

    def __init__(self) -> None:
        self._damage: list[Damage] = []

    def note(self, damage: Damage) -> None:
        log_damage(damage)
        if damage.kind == "damaged":
            self._damage.append(damage)

    def faults(self) -> Iterator[tuple[str, bytes, BrokenShardError]]:
        for damage in self._damage:
            yield damage.shard, b"", BrokenShardError(damage.text)


def label_of(sample: Sample) -> int:
    """The number of the class, from the `cls` member.

    Raises:
        ValueError: there is none.
    """
    label = member(sample, "cls")
    if label is None:
        raise ValueError("no cls member")
    try:
        return int(label)
    except ValueError:
        raise ValueError(f"its cls member {label[:20]!r} is not a class number") from None


def labels_of(sample: Sample) -> np.ndarray:
    """Which classes an image shows, [C] bool, from the `npy` member: 0 or 1 for each class.

    Raises:
        ValueError: there is none, or it is something else.
    """
    data = member(sample, "npy")
    if data is None:
        raise ValueError("no npy member")
    try:
        labels = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"its npy member cannot be read: {error}") from error
    # np.load also opens archives of several arrays, and arrays of text
    fits = isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "biuf"
    if not fits or not np.isin(labels, (0, 1)).all():
        raise ValueError("its npy member is not a 0 or 1 for each class")
    return labels.astype(bool)


@dataclass(frozen=True)
class EvalShards:
    """Shards of images and of what belongs to them."""

    shards: list[str]
    target: Callable[[Sample], Any] = label_of
    """What belongs to the image of a sample, such as `Captions.all`; or a ValueError that says why there is nothing."""
    image: str = "jpg;jpeg;png;webp"
    settings: tuple[str, ...] = ("image", "shards")

    def share(self, lane: int, lanes: int) -> Iterator[tuple[str, bytes, Any]]:
        broken = _Broken()
        for shard, _, sample in share_of_lane(self.shards, lane=lane, lanes=lanes, on_damage=broken.note):
            data = member(sample, self.image)
            try:
                target = ValueError("no image member") if data is None else self.target(sample)
            except ValueError as error:
                target = error
            yield f"{sample['__key__']} of {shard}", data or b"", target
        yield from broken.faults()


_HIDDEN = re.compile(r"\.|__MACOSX$")


@dataclass(frozen=True)
class ImageFolder:
    """One sub-folder for each class. Hidden ones are none, nor is what macOS leaves in archives."""

    folder: str
    numbers: Mapping[str, int] | None = None
    """Class of each sub-folder, by its name; None where class n is the n-th in the order of names."""
    settings: tuple[str, ...] = ("folder",)

    def classes(self) -> list[Path]:
        """Sub-folders in order.

        Raises:
            FileNotFoundError: no such folder, or no sub-folders in it.
        """
        root = Path(self.folder).expanduser()
        found = [p for p in sorted(root.iterdir()) if p.is_dir() and not _HIDDEN.match(p.name)] if root.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{root}: expected a folder with one sub-folder of images for each class")
        return found

    def images(self, folder: Path) -> list[Path]:
        """Those of a sub-folder, in order."""
        return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != ".")

    def share(self, lane: int, lanes: int) -> Iterator[tuple[str, bytes, Any]]:
        number = 0
        for position, folder in enumerate(self.classes()):
            for path in self.images(folder):
                if number % lanes == lane:
                    yield _read(path, position if self.numbers is None else self.numbers[folder.name])
                number += 1


@dataclass(frozen=True)
class ImageFiles:
    """Image files with what belongs to each."""

    files: Sequence[tuple[str, Any]]
    """(path, target); a ValueError as target says why there is none."""
    settings: tuple[str, ...] = ("folder",)

    def share(self, lane: int, lanes: int) -> Iterator[tuple[str, bytes, Any]]:
        for path, target in self.files[lane::lanes]:
            yield _read(Path(path), target)


def _read(path: Path, target: Any) -> tuple[str, bytes, Any]:
    try:
        return str(path), path.read_bytes(), target
    except OSError as error:  # no such file, no permission, a dangling link, a folder of such a name
        return str(path), b"", ValueError(str(error))


def first_targets(source: Source, count: int = 100) -> list[Any]:
    """Targets of the first samples of a source, without those at fault: enough to find a wrong setting early.

    Raises:
        ValueError: there are no samples, or all of the first are at fault.
    """
    found = [(name, target) for name, _, target in itertools.islice(source.share(0, 1), count)]
    if not found:
        raise ValueError("it holds no samples that could be read")
    good = [target for _, target in found if not isinstance(target, ValueError)]
    if not good:
        raise ValueError(f"none of its first {len(found)} samples can be used; {found[0][0]}: {found[0][1]}")
    return good


@dataclass(frozen=True)
class EvalStream(IterableDataset):
    """Batches of this rank's share: {"image": [B, 3, H, W], "target": list of B, "faults": EvalFaults}; the last may
    have no images but faults."""

    source: Source
    transform: Callable[[Image.Image], Tensor]
    """PIL image -> normalised [3, H, W]."""
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        images, targets, faults = [], [], EvalFaults()
        for name, data, target in self.source.share(self.rank * workers + worker, self.world_size * workers):
            try:
                if isinstance(target, ValueError):
                    raise target
                images.append(self.transform(decode_pil(data)))
                targets.append(target)
            except BrokenShardError:  # whoever read it has said why
                faults.broken.add(name)
            except ValueError as error:
                log.warning("sample %s cannot be evaluated: %s", name, error)
                faults.failed += 1
            if len(images) == self.batch_size:
                yield _batch(images, targets, faults)
                images, targets, faults = [], [], EvalFaults()
        if images or faults != EvalFaults():
            yield _batch(images, targets, faults)


def _batch(images: list[Tensor], targets: list[Any], faults: EvalFaults) -> dict[str, Any]:
    stacked = torch.stack(images) if images else torch.empty(0)
    return {"image": stacked, "target": targets, "faults": faults}
