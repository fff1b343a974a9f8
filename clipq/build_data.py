"""Configuration -> training data."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from clipq.config.data import CaptionConfig, DataConfig, FilterConfig, TableConfig
from clipq.data.cache import Cache
from clipq.data.decode import Captions, TrainTransform
from clipq.data.filters import Filter, Range
from clipq.data.index import read_counts
from clipq.data.loader import StreamPlace, TrainStream, batches, default_workers
from clipq.data.remote import is_url
from clipq.data.shards import DataError, expand
from clipq.data.source import Source
from clipq.data.table import Columns, Table, TableShards, is_table
from clipq.dist.env import DistEnv
from clipq.model.clip import ClipModel, Preprocess

log = logging.getLogger(__name__)


def interpolation(preprocess: Preprocess) -> str:
    """How training images are resized, whatever the model's own name for it."""
    return "bicubic" if preprocess.interpolation == "random" else preprocess.interpolation


def build_captions(config: CaptionConfig) -> Captions:
    return Captions(config.field, config.lines)


def build_cache(config: DataConfig) -> Cache | None:
    """Where remote shards are kept, if they are.

    Raises:
        ValueError: the folder cannot be used.
    """
    if config.cache is None or config.cache_gb is None:
        return None
    cache = Cache(config.cache, round(config.cache_gb * 1e9))
    cache.check()
    return cache


def build_tables(
    names: list[str], config: TableConfig, caption: CaptionConfig, filter: Filter, *, setting: str, columns: str
) -> list[TableShards] | None:
    """The tables that are named, if they are tables.

    Args:
        setting: which names them.
        columns: which names their columns.

    Raises:
        ValueError: they cannot be used.
    """
    tables = [name for name in names if is_table(name)]
    if not tables:
        return None
    if len(tables) < len(names):
        shard = next(name for name in names if name not in tables)
        raise ValueError(f"{setting}: {tables[0]} is a table, {shard} is none: make each a source of data.sources")
    if is_url(tables[0]):
        raise ValueError(f"{setting}: {tables[0]} is an address, and tables are read from files: copy it here first")
    if caption.field != "txt":
        raise ValueError(
            f"{setting}: {tables[0]} is a table, whose captions are in the column {columns}.caption={config.caption}: "
            f"leave caption.field={caption.field} at txt"
        )
    if set(filter.reasons) - {"caption_length"}:
        raise ValueError(
            f"{setting}: {tables[0]} is a table, of which only captions are filtered (filter.caption_length): leave "
            "out the other rows when you write it"
        )
    own = Columns(config.image, config.caption, (f"{columns}.image", f"{columns}.caption"))
    try:
        return [TableShards(Table(Path(name), own)) for name in tables]
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}: {error}") from error


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
        FileNotFoundError, ValueError: as of `expand`, `read_counts` and `build_cache`.
    """
    cache = build_cache(config)
    return [find_source(config, name, cache) for name in config.sources or [None]]


def find_source(config: DataConfig, name: str | None, cache: Cache | None) -> Source:
    """The source of this name; None for `data.shards`.

    Raises:
        FileNotFoundError, ValueError: as of `expand` and `read_counts`.
    """
    captions, filter = build_captions(config.caption), build_filter(config.filter)
    if name is None:
        shards = expand(config.shards)
        tables = build_tables(shards, config.table, config.caption, filter, setting="data.shards", columns="data.table")
        return _source(shards, tables, captions, config.image, filter=filter, cache=cache)
    source, setting = config.sources[name], f"data.sources.{name}"
    shards = expand(source.shards)
    kept = filter if source.filter is None else build_filter(source.filter)
    tables = build_tables(
        shards,
        source.table or config.table,
        source.caption or config.caption,
        kept,
        setting=setting,
        columns="data.table" if source.table is None else f"{setting}.table",
    )
    return _source(
        shards,
        tables,
        captions if source.caption is None else build_captions(source.caption),
        source.image or config.image,
        weight=source.weight,
        passes=source.passes,
        setting=setting,
        filter=kept,
        cache=cache,
    )


def _source(shards: list[str], tables: list[TableShards] | None, captions: Captions, image: str, **more: Any) -> Source:
    if tables is None:
        return Source(shards, captions, image, counts=read_counts(shards), **more)
    return Source([name for table in tables for name in table.names], captions, image, tables=tables, **more)


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
    warn_of_parts(sources, lanes)
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


MANY_PARTS = 4
"""Lanes of one shard, from which on reading it for each of them is worth a word."""


def warn_of_parts(sources: list[Source], lanes: int) -> None:
    """Says which sources have few shards for so many lanes: each lane reads all of a shard for its part of it."""
    for source in sources:
        parts = -(-lanes // len(source.shards))
        if source.tables is None and parts > MANY_PARTS:
            log.warning(
                "%s: %d lanes read %d shards, so that each shard is read %d times in a pass: pack them into %d or more "
                "(clipq-data make)",
                *(source.setting, lanes, len(source.shards), parts, lanes),
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
