"""Batches: what the training loop and the evaluators draw from.

The batches of a training run are a function of (seed, shards, lanes, batch size, step). Loader processes each read some
of the lanes, and write their part of every batch where all of it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import mmap
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipq.data.decode import TrainTransform
from clipq.data.faults import Faults, Named
from clipq.data.filters import all_left_out
from clipq.data.order import AllLeftOutError, Item, Lane, Mix, Order, Place
from clipq.data.parallel import cores
from clipq.data.shards import LACKING, DataError
from clipq.data.source import Source

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]
Pair = tuple[Tensor, Tensor, str]
"""Image, tokens and key."""


@dataclass(frozen=True)
class StreamPlace:
    """Where a rank is in the data."""

    drawn: int
    """Samples drawn by all ranks."""
    lanes: Tensor
    """[lanes of the rank, sources, 4] int64: the `Place` of each."""

    @classmethod
    def of_all(cls, ranks: list[StreamPlace]) -> StreamPlace:
        """Of all lanes in their order, from the places of all ranks."""
        first = ranks[0].lanes
        lanes = first.new_empty(sum(len(r.lanes) for r in ranks), *first.shape[1:])
        for rank, place in enumerate(ranks):
            lanes[rank :: len(ranks)] = place.lanes
        return cls(ranks[0].drawn, lanes)

    def of_rank(self, rank: int, world_size: int) -> StreamPlace:
        """Of the lanes that fall to a rank; the inverse of `of_all`."""
        return StreamPlace(self.drawn, self.lanes[rank::world_size].clone())


class Slots:
    """Batches in the making, which the loader processes write to and the training process reads.

    Tensors sent from process to process cost a request each that the sender has to answer, while it is busy decoding.
    The memory has no name: /dev/shm, where torch would share it, is 64 MB in a container.

    Args:
        count: of batches.
        image: shape of a batch's images, uint8.
        text: shape of a batch's tokens, int32.
    """

    def __init__(self, count: int, image: tuple[int, ...], text: tuple[int, ...]) -> None:
        self.image = self._shared((count, *image), torch.uint8)
        self.text = self._shared((count, *text), torch.int32)

    def taken(self, slot: int, *, pin_memory: bool) -> dict[str, Tensor]:
        """A copy of a batch."""
        found = {"image": self.image[slot], "text": self.text[slot]}
        copies = {k: torch.empty(x.shape, dtype=x.dtype, pin_memory=pin_memory) for k, x in found.items()}
        for name, copy in copies.items():
            np.copyto(copy.numpy(), found[name].numpy())  # torch would ask threads that the cores have no time for
        return copies

    @staticmethod
    def _shared(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
        return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(frozen=True)
class TrainStream:
    """Endless batches of one rank, from a place on; `batches` gives them."""

    sources: list[Source]
    transform: TrainTransform
    tokenizer: Tokenizer
    batch_size: int
    """Pairs in a batch of this rank."""
    lanes: int
    """Of all ranks."""
    seed: int = 0
    shuffle: int = 1024
    """Samples that a lane shuffles at a time."""
    rank: int = 0
    world_size: int = 1
    place: StreamPlace | None = None
    """Where to begin; None for the start."""

    def __post_init__(self) -> None:
        if self.lanes % self.world_size:
            raise ValueError(f"{self.lanes} lanes cannot be shared by {self.world_size} ranks")
        if self.place is None:
            places = torch.zeros(self.lanes // self.world_size, len(self.sources), len(Place()), dtype=torch.int64)
            object.__setattr__(self, "place", StreamPlace(0, places))

    @property
    def reasons(self) -> list[str]:
        """For which samples may be left out."""
        return list(dict.fromkeys([*LACKING, *(reason for s in self.sources for reason in s.filter.reasons)]))

    @property
    def names(self) -> list[str]:
        """Of the sources, where there are several."""
        return [source.name for source in self.sources] if len(self.sources) > 1 else []

    def starting_at(self, place: StreamPlace) -> TrainStream:
        """The same stream from a place on."""
        return dataclasses.replace(self, place=place)

    def slots(self, count: int) -> Slots:
        context = len(self.tokenizer([""])[0])
        return Slots(count, (self.batch_size, 3, *self.transform.size), (self.batch_size, context))

    def parts(self, slots: Slots, worker: int, workers: int) -> Iterator[dict[str, Any]]:
        """Writes the part of every batch that a loader process makes, the n-th into slot n mod slots.

        What comes of it is {"at": [n] where in the batch, "key": [n], "lanes": [lanes of the process][sources] their
        places after it, "faults": of this part}. Where the data cannot be gone on with, the last is {"error": why,
        "faults"}: an error that crosses from a process gets its traceback into the message, and is in a cycle that
        keeps the other processes until it is collected.
        """
        assert self.place is not None
        count = len(self.place.lanes)
        faults = Faults()
        lanes = {own: self._lane(own, self.place, faults) for own in range(worker, count, workers)}
        # sample g of all ranks is of lane g mod L, and rank r has those with g mod ranks = r
        first = -(-(self.place.drawn - self.rank) // self.world_size)
        encode = functools.lru_cache(maxsize=1 << 12)(self._encode)
        for slot in itertools.cycle(range(len(slots.image))):
            at = [n for n in range(self.batch_size) if (first + n) % count in lanes]
            keys: list[str] = []
            try:
                for n in at:
                    image, text, key = self._pair(lanes[(first + n) % count], encode, faults)
                    slots.image[slot, n], slots.text[slot, n] = image, text
                    keys.append(key)
            except DataError as error:
                yield {"error": str(error), "faults": faults.taken()}
                return
            places = [[tuple(lane.place) for lane in mix.lanes] for mix in lanes.values()]
            yield {"at": at, "key": keys, "lanes": places, "faults": faults.taken()}
            first += self.batch_size

    def _lane(self, own: int, start: StreamPlace, faults: Faults) -> Mix:
        """A lane of this rank, by its number here."""
        lane = own * self.world_size + self.rank
        of_sources = [
            Lane(order, lane, Place(*place), functools.partial(source.read, order, faults))
            for source, order, place in zip(self.sources, self._orders(), start.lanes[own].tolist(), strict=True)
        ]
        numbers = itertools.count(start.drawn + (lane - start.drawn) % self.lanes, self.lanes)
        return Mix(of_sources, [source.weight for source in self.sources], seed=self.seed, numbers=numbers)

    def _orders(self) -> list[Order]:
        return [
            Order(len(source.shards), self.lanes, self.seed, self.shuffle, source=number, passes=source.passes)
            for number, source in enumerate(self.sources)
        ]

    def _encode(self, caption: str) -> Tensor:
        return self.tokenizer([caption])[0].to(torch.int32)

    def _pair(self, mix: Mix, encode: Callable[[str], Tensor], faults: Faults) -> Pair:
        """The next pair of a lane. In place of one that cannot be read comes another: all others keep their places.

        Raises:
            DataError: it cannot be read, and nor can those tried in its place; or the data is used up.
        """
        try:
            lane, item = mix.draw()
        except AllLeftOutError as error:
            raise DataError(f"{self.sources[error.source].setting}: {all_left_out(error.left_out)}") from error
        faults.samples += 1
        faults.sources[self.sources[lane.order.source].name] += 1
        faults.filtered.update(item.left_out)
        try:
            return self._made(lane, item, encode)
        except ValueError as error:
            if item.sample is None:
                faults.missing += 1
            else:
                faults.unreadable += 1
                faults.last = f"{item.sample['__key__']} of {item.sample['__url__']}"
                log.warning("sample %s left out: %s", faults.last, error)
        for spare in lane.spares(item, random.Random(f"{self._own(lane, item)} spare")):
            with contextlib.suppress(ValueError):
                return self._made(lane, spare, encode)
        raise DataError(
            f"sample {faults.last} cannot be read, and nor can those tried in its place (see the warnings before)"
        )

    def _made(self, lane: Lane, item: Item, encode: Callable[[str], Tensor]) -> Pair:
        """A sample as a pair.

        Raises:
            ValueError: it cannot be read.
        """
        sample, source = item.sample, self.sources[lane.order.source]
        if sample is None:
            raise ValueError("it is missing")
        data = source.image_of(sample)
        rng = random.Random(self._own(lane, item))
        image, text = self.transform(data, rng), encode(source.captions.one(sample, rng, source.filter.fits))
        return image, text, f"{sample['__url__']}/{sample['__key__']}"

    def _own(self, lane: Lane, item: Item) -> str:
        """What is random about a sample is its own: neither order nor processes change it."""
        return f"{self.seed} {lane.order.source} {item.visit.round} {item.visit.shard} {item.index}"


@dataclass(frozen=True)
class _Parts(IterableDataset):
    """What of a stream the process makes in which it is iterated."""

    stream: TrainStream
    slots: Slots

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        parts = self.stream.parts(self.slots, *((info.id, info.num_workers) if info else (0, 1)))
        # It has no end, whatever happens: torch would give the tasks of a process that has come to its end to others,
        # which then write to batches that are not taken yet.
        return iter(lambda: next(parts, {"error": "a loader process has ended before", "faults": Faults()}), None)


def batches(
    stream: TrainStream, *, workers: int, prefetch: int = 2, pin_memory: bool = False, max_lost: float = 0.05
) -> Generator[dict[str, Any]]:
    """Endless batches of a rank, {"image": [B, 3, H, W] uint8, "text": [B, context] int32, "key": [B], "place": where
    the rank is after it, "lost": samples and shards that could not be read meanwhile, "filtered": {reason: samples left
    out} of those that it came to, with each reason that there may be, "sources": {name: samples} if several}.

    A key is the shard that a sample is from and its key in there, `train/00007.tar/000123`.

    Args:
        workers: loader processes, no more than lanes of the rank; 0 loads in this process.
        prefetch: batches that are kept ready.
        pin_memory: put batches where they can be copied to a GPU asynchronously.
        max_lost: share of the samples, and of the shards, that may be unreadable.

    Raises:
        DataError: training cannot go on with this data.
    """
    faults, named = Faults(), Named()
    place = stream.place
    assert place is not None
    # A process begins a part when the one `prefetch` before is taken here; the batch before that is copied by then.
    slots = stream.slots(prefetch + 1 if workers else 1)
    loader = iter(make_loader(_Parts(stream, slots), workers=workers, prefetch=prefetch))
    for slot in itertools.cycle(range(len(slots.image))):
        parts = [next(loader) for _ in range(max(1, workers))]
        for part in parts:
            faults.add(part["faults"])
            named.add(part["faults"].damage)
        for part in parts:
            if "error" in part:
                raise DataError(part["error"])
        lanes = torch.empty_like(place.lanes)
        for worker, part in enumerate(parts):
            lanes[worker :: len(parts)] = torch.tensor(part["lanes"])
        place = StreamPlace(place.drawn + stream.batch_size * stream.world_size, lanes)
        faults.check(max_lost)
        keys: dict[int, str] = {n: key for part in parts for n, key in zip(part["at"], part["key"], strict=True)}
        yield {
            **slots.taken(slot, pin_memory=pin_memory),
            "key": [keys[n] for n in range(stream.batch_size)],
            "place": place,
            "lost": sum(part["faults"].total for part in parts),
            "filtered": {r: sum(part["faults"].filtered[r] for part in parts) for r in stream.reasons},
            "sources": {name: sum(part["faults"].sources[name] for part in parts) for name in stream.names},
        }


def default_workers(local_world_size: int) -> int:
    """Loader processes of a rank: its share of the CPU cores less one, between 1 and 14."""
    return min(14, max(1, cores() // local_world_size - 1))


def make_loader(
    dataset: IterableDataset, *, workers: int, prefetch: int = 2, pin_memory: bool = False
) -> DataLoader[Any]:
    """A DataLoader over a dataset that yields whole batches, or parts of them.

    Args:
        workers: loader processes; 0 loads in this process.
        prefetch: batches that each process keeps ready.
        pin_memory: stage batches for asynchronous copies to a GPU.
    """
    return _Loader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_begin if workers else None,
        # Forked processes begin in milliseconds. Children of a process that uses CUDA must not: ours never do.
        multiprocessing_context="fork" if workers else None,
        # Without one of its own the loader draws a number from the global generator, which dropout draws from too: a
        # resumed run would have other masks than an uninterrupted one.
        generator=torch.Generator(),
    )


class _Loader(DataLoader):
    """A process that was killed is found when a batch is asked for. torch would raise its error wherever this process
    is at that moment: in the midst of a step, or of writing a checkpoint."""

    def __iter__(self) -> Any:
        if threading.current_thread() is not threading.main_thread():
            return super().__iter__()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            return super().__iter__()
        finally:
            signal.signal(signal.SIGCHLD, handler)


def _as_it_is(batch: Any) -> Any:
    """torch's own function would go through every list."""
    return batch


def _begin(worker: int) -> None:
    torch.set_num_threads(1)
    # The terminal sends Ctrl-C to all processes at once, a scheduler its signals: where the main process handles them,
    # it still needs its batches, and ends its loaders itself.
    # Heard and not ignored: what is ignored stays so for the commands of `pipe:`.
    signal.signal(signal.SIGINT, _heard)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        if callable(signal.getsignal(number)):
            signal.signal(number, _heard)


def _heard(*_: object) -> None:
    pass
