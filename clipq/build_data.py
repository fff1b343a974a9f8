"""Configuration -> training data."""

from __future__ import annotations

import logging
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from clipq.config.data import CaptionConfig, DataConfig
from clipq.data.decode import Captions, TrainTransform
from clipq.data.loader import Source, StreamPlace, TrainStream, batches, default_workers
from clipq.data.order import Order
from clipq.data.shards import DataError, check_members, expand
from clipq.dist.env import DistEnv
from clipq.model.clip import ClipModel, Preprocess

log = logging.getLogger(__name__)


def interpolation(preprocess: Preprocess) -> str:
    """How training images are resized, whatever the model's own name for it."""
    return "bicubic" if preprocess.interpolation == "random" else preprocess.interpolation


def build_captions(config: CaptionConfig) -> Captions:
    return Captions(config.field, config.lines)


@dataclass(frozen=True)
class SourceFiles:
    """A source of the configuration, with the shards that are there."""

    name: str
    shards: list[str]
    captions: Captions
    image: str
    weight: float = 1.0
    passes: int | None = None

    def check(self) -> None:
        """Looks at the first samples.

        Raises:
            DataError: they are not what the configuration says.
        """
        check_members(self.shards, (self.image, self.captions.member), self.captions.all)


def find_sources(config: DataConfig) -> list[SourceFiles]:
    """The sources of the training data.

    Raises:
        FileNotFoundError, ValueError: as of `expand`.
    """
    captions = build_captions(config.caption)
    if config.shards is not None:
        return [SourceFiles("shards", expand(config.shards), captions, config.image)]
    return [
        SourceFiles(
            name,
            expand(source.shards),
            captions if source.caption is None else build_captions(source.caption),
            source.image or config.image,
            source.weight,
            source.passes,
        )
        for name, source in config.sources.items()
    ]


def build_stream(
    config: DataConfig,
    sources: list[SourceFiles],
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
        sources=[
            Source(
                files.shards,
                Order(len(files.shards), lanes, seed, config.shuffle, source=number, passes=files.passes),
                files.captions,
                files.image,
                files.weight,
            )
            for number, files in enumerate(sources)
        ],
        transform=transform,
        tokenizer=clip.tokenizer,
        batch_size=batch_size // env.world_size,
        lanes=lanes,
        seed=seed,
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
    except DataError as error:
        # DataLoader puts the traceback of its worker process into the message.
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a loader process ended without a word ({error}): often the system had no memory left for it; lower "
            "data.workers, data.shuffle or data.prefetch"
        ) from error
