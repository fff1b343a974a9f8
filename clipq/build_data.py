"""Configuration -> training data."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from typing import Any

from clipq.config.data import CaptionConfig, DataConfig, FilterConfig
from clipq.data.decode import Captions, TrainTransform
from clipq.data.filters import Filter, Range
from clipq.data.index import read_counts
from clipq.data.loader import Source, StreamPlace, TrainStream, batches, default_workers
from clipq.data.shards import DataError, expand
from clipq.dist.env import DistEnv
from clipq.model.clip import ClipModel, Preprocess

log = logging.getLogger(__name__)


def interpolation(preprocess: Preprocess) -> str:
    """How training images are resized, whatever the model's own name for it."""
    return "bicubic" if preprocess.interpolation == "random" else preprocess.interpolation


def build_captions(config: CaptionConfig) -> Captions:
    return Captions(config.field, config.lines)


def build_filter(config: FilterConfig) -> Filter:
    return Filter(
        min_size=config.min_size,
        max_aspect=config.max_aspect,
        caption_length=None if config.caption_length is None else _range(config.caption_length),
        json={name: _range(bounds) for name, bounds in config.json.items()},
    )


def _range(bounds: Sequence[float | None]) -> Range:
    low, high = bounds
    return Range(-math.inf if low is None else low, math.inf if high is None else high)


def find_sources(config: DataConfig) -> list[Source]:
    """The sources of the training data.

    Raises:
        FileNotFoundError, ValueError: as of `expand` and `read_counts`.
    """
    captions, filter = build_captions(config.caption), build_filter(config.filter)
    if config.shards is not None:
        shards = expand(config.shards)
        return [Source(shards, captions, config.image, counts=read_counts(shards), filter=filter)]
    sources: list[Source] = []
    for name, source in config.sources.items():
        shards = expand(source.shards)
        own = captions if source.caption is None else build_captions(source.caption)
        sources.append(
            Source(
                shards,
                own,
                source.image or config.image,
                weight=source.weight,
                passes=source.passes,
                counts=read_counts(shards),
                setting=f"data.sources.{name}",
                filter=filter if source.filter is None else build_filter(source.filter),
            )
        )
    return sources


def build_stream(
    config: DataConfig,
    sources: list[Source],
    lanes: int,
    clip: ClipModel,
    env: DistEnv,
    *,
    batch_size: int,
    seed: int,
) -> TrainStream:
    """Training batches of this rank from the start on; `batch_size` counts the pairs of all ranks."""
    augment, preprocess = config.augment, clip.preprocess
    transform = TrainTransform(
        size=preprocess.size,
        interpolation=interpolation(preprocess),
        scale=(augment.scale[0], augment.scale[1]),
        ratio=(augment.ratio[0], augment.ratio[1]),
        flip=augment.flip,
        color_jitter=tuple(augment.color_jitter),
        color_jitter_prob=augment.color_jitter_prob,
        grayscale=augment.grayscale,
    )
    return TrainStream(
        sources=sources,
        transform=transform,
        tokenizer=clip.tokenizer,
        batch_size=batch_size // env.world_size,
        lanes=lanes,
        seed=seed,
        shuffle=config.shuffle,
        rank=env.rank,
        world_size=env.world_size,
    )


def loader_processes(config: DataConfig, lanes: int, env: DistEnv) -> int:
    """Loader processes of this rank: no more than it has lanes."""
    wanted = default_workers(env.local_world_size) if config.workers is None else config.workers
    most = lanes // env.world_size
    if wanted > most:
        log.warning(
            "%d loader processes for each rank, not %d: %d lanes are read side by side. Pack the data into more "
            "shards, or set data.lanes=%d, and several lanes will share a shard",
            *(most, wanted, lanes, wanted * env.world_size),
        )
    return min(wanted, most)


def train_batches(
    stream: TrainStream, workers: int, config: DataConfig, env: DistEnv, place: StreamPlace | None
) -> Generator[dict[str, Any]]:
    """Batches of a stream from a place on; None for its start.

    Raises:
        DataError: training cannot go on with this data.
    """
    if place is not None:
        stream = stream.starting_at(place)
    try:
        yield from batches(
            stream,
            workers=workers,
            prefetch=config.prefetch,
            pin_memory=env.device.type == "cuda",
            max_lost=config.max_lost,
        )
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a loader process ended without a word ({error}): often the system had no memory left for it; lower "
            "data.workers, data.shuffle or data.prefetch"
        ) from error
