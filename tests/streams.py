"""Training streams over small shards, and what comes out of them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from clipq.data.decode import Captions, TrainTransform
from clipq.data.loader import TrainStream, batches
from clipq.data.order import usual_lanes
from clipq.data.source import Source

TEXT = Captions("txt")


def tokenizer(texts: list[str]) -> Tensor:
    """ "red 17" -> [17, …]: the number of the sample, and a few bytes of its caption."""
    return torch.tensor([[int(t.split()[-1]) if t else 0, *f"{t:3}".encode()[:3]] for t in texts])


def stream(
    shards: list[str],
    *,
    lanes: int | None = None,
    seed: int = 0,
    shuffle: int = 8,
    captions: Captions = TEXT,
    image: str = "png",
    **options: object,
) -> TrainStream:
    lanes = lanes or usual_lanes(len(shards), options.get("world_size", 1))  # pyright: ignore
    return mixed([Source(shards, captions, image)], lanes=lanes, seed=seed, shuffle=shuffle, **options)


def mixed(sources: list[Source], **options: object) -> TrainStream:
    settings = {
        "batch_size": 6,
        "shuffle": 8,
        "transform": TrainTransform((8, 8), flip=0.5, scale=(0.5, 1.0)),
    } | options
    return TrainStream(sources, tokenizer=tokenizer, **settings)  # pyright: ignore


def taken(s: TrainStream, count: int, workers: int = 0) -> list[dict[str, Any]]:
    return list(itertools.islice(batches(s, workers=workers, max_lost=1.0), count))


def numbers(found: list[dict[str, Tensor]]) -> list[int]:
    return [n for batch in found for n in batch["text"][:, 0].tolist()]


def same(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in ("image", "text")
    )
