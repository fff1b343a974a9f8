"""Batches: what the training loop and the evaluators draw from.

The order of a training run is a function of (seed, shards, ranks, workers, step): a loader that starts at step s
yields the very batches that an uninterrupted one yields from step s on. It gets there by reading, not decoding, the
samples before.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from clipq.data.decode import Captions, TrainTransform
from clipq.data.shards import DataError, Sample, member, shuffled_samples

log = logging.getLogger(__name__)

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class TrainStream(IterableDataset):
    """Endless training batches of one rank: {"image": [B, 3, H, W] uint8, "text": [B, context] int32, "key": [B]}.

    A key is the shard that a sample is from and its key in there, `train/00007.tar/000123`.
    """

    shards: list[str]
    transform: TrainTransform
    captions: Captions
    tokenizer: Tokenizer
    batch_size: int
    """Pairs in a batch of this rank."""
    image: str = "jpg;jpeg;png;webp"
    shuffle: int = 4096
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    start: int = 0
    """Batches of this rank that were delivered before."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # DataLoader deals batches out in turn, beginning with worker 0. The batch at position p belongs to lane
        # p mod workers wherever the loader starts.
        lane_of_rank = (self.start + worker) % workers
        batch = self.start // workers + (lane_of_rank < self.start % workers)
        lane = self.rank * workers + lane_of_rank
        samples = shuffled_samples(
            self.shards,
            (self.image, self.captions.member),
            seed=self.seed,
            lane=lane,
            lanes=self.world_size * workers,
            buffer=self.shuffle,
        )
        samples = itertools.islice(samples, batch * self.batch_size, None)
        encode = functools.lru_cache(maxsize=1 << 16)(self._encode)
        while True:
            raw = list(itertools.islice(samples, self.batch_size))
            yield self._batch(raw, random.Random(f"{self.seed} {lane} {batch}"), encode)
            batch += 1

    def starting_at(self, batch: int) -> TrainStream:
        """The same stream from a batch of this rank on."""
        return dataclasses.replace(self, start=batch)

    def _encode(self, caption: str) -> Tensor:
        return self.tokenizer([caption])[0].to(torch.int32)

    def _batch(self, raw: list[Sample], rng: random.Random, encode: Callable[[str], Tensor]) -> dict[str, Any]:
        pairs: list[tuple[Tensor, Tensor, str] | None] = []
        for sample in raw:
            try:
                data = member(sample, self.image)
                assert data is not None  # shuffled_samples lets no other sample through
                image, text = self.transform(data, rng), encode(self.captions.one(sample, rng))
                pairs.append((image, text, f"{sample['__url__']}/{sample['__key__']}"))
            except ValueError as error:
                log.warning("sample %s of %s left out: %s", sample["__key__"], sample["__url__"], error)
                pairs.append(None)
        good = [pair for pair in pairs if pair is not None]
        if not good:
            raise DataError(
                f"none of the {len(raw)} samples of a batch could be read; "
                f"the last was {raw[-1]['__key__']} of {raw[-1]['__url__']} (see the warnings before)"
            )
        # A sample that cannot be read is replaced by another of its batch: all others keep their places.
        images, texts, keys = zip(*(pair or rng.choice(good) for pair in pairs), strict=True)
        return {"image": torch.stack(images), "text": torch.stack(texts), "key": list(keys)}


def default_workers(local_world_size: int) -> int:
    """Loader processes of a rank: its share of the CPU cores less one, between 1 and 14."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(14, max(1, cores // local_world_size - 1))


def warn_of_few_shards(shards: int, *, ranks: int, workers: int) -> None:
    """Says so where shards are fewer than lanes: several lanes then read the same shard at a time."""
    lanes = ranks * max(1, workers)
    if shards >= lanes:
        return
    log.warning(
        "%d shards for %d loader processes (%d ranks with %d each): several read the same shard at a time, so that "
        "pairs come again within a few steps%s. Pack the data into %d shards or more%s",
        *(shards, lanes, ranks, max(1, workers)),
        " and within a batch, each a wrong negative of the other" if ranks > 1 else "",
        lanes,
        f", or set data.workers={shards // ranks}" if shards >= ranks else "",
    )


def make_loader(
    dataset: IterableDataset, *, workers: int, prefetch: int = 2, pin_memory: bool = False
) -> DataLoader[Any]:
    """A DataLoader over a dataset that yields whole batches.

    Args:
        workers: loader processes; 0 loads in this process.
        prefetch: batches that each process keeps ready.
        pin_memory: stage batches for asynchronous copies to a GPU.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread if workers else None,
        multiprocessing_context=_start_method() if workers else None,
        # Without one of its own the loader draws a number from the global generator, which dropout draws from too: a
        # resumed run would have other masks than an uninterrupted one.
        generator=torch.Generator(),
    )


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _start_method() -> str:
    """Fork where it is safe: it starts workers in milliseconds. A process that holds a CUDA context must not fork
    children that touch CUDA; ours never do."""
    return "fork" if hasattr(os, "fork") else "spawn"
