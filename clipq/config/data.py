"""Settings of the training data, each documented where it is declared."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from clipq.config.checks import require, strings


@dataclass
class CaptionConfig:
    field: Any = "txt"
    """Where captions are: `txt`, or `json.NAME` for the field NAME of the `json` member (a string or a list). Or
    several of these with a probability each, as in `{txt: 0.5, json.captions: 0.5}`: each time a sample is seen, its
    caption is from one of those that it has."""
    lines: bool = False
    """A `txt` member holds one caption a line; one is chosen at random each time the sample is seen."""

    def __post_init__(self) -> None:
        given = f"data.caption.field={self.field!r}"
        names = list(self.field) if isinstance(self.field, dict) else [self.field]
        require(
            len(names) > 0
            and all(isinstance(n, str) and (n == "txt" or (n.startswith("json.") and len(n) > 5)) for n in names),
            f"{given}: expected 'txt' or 'json.NAME', as in 'json.captions', or several of these with a probability "
            "each, as in {txt: 0.5, json.captions: 0.5}",
        )
        if isinstance(self.field, dict):
            require(
                all(_is_number(p) and p > 0 for p in self.field.values()) and abs(sum(self.field.values()) - 1) < 1e-5,
                f"{given}: expected a positive probability for each field, and 1 as their sum",
            )


@dataclass
class FilterConfig:
    """What samples have to be like to be trained on. Others are left out, which is no loss: see `data.max_lost`."""

    min_size: int | None = None
    """Pixels of the image's short side, at least."""
    max_aspect: float | None = None
    """Long side of the image by its short side, at most."""
    caption_length: list[int | None] | None = None
    """Characters of a caption, [fewest, most]; either may be null. Captions of other lengths are not chosen, and a
    sample that has no other is left out."""
    json: dict[str, Any] = field(default_factory=dict)
    """Numeric field of the `json` member -> [lowest, highest]; either may be null. A sample that has no such number is
    left out."""

    def __post_init__(self) -> None:
        require(
            self.min_size is None or self.min_size >= 1, f"data.filter.min_size={self.min_size}: expected 1 or more"
        )
        require(
            self.max_aspect is None or 1 <= self.max_aspect < math.inf,
            f"data.filter.max_aspect={self.max_aspect}: expected a finite number from 1 on, long side by short side",
        )
        if self.caption_length is not None:
            _check_range("data.filter.caption_length", self.caption_length)
            require(
                all(bound is None or bound >= 0 for bound in self.caption_length),
                f"data.filter.caption_length={self.caption_length}: characters are 0 or more",
            )
        for name, bounds in self.json.items():
            _check_range(f"data.filter.json.{name}", bounds)


def _check_range(where: str, bounds: Any) -> None:
    require(
        isinstance(bounds, list) and len(bounds) == 2 and all(b is None or _is_number(b) for b in bounds),
        f"{where}={bounds!r}: expected [lowest, highest], of which either may be null, as in [0.28,null]",
    )
    low, high = (end if bound is None else bound for bound, end in zip(bounds, (-math.inf, math.inf), strict=True))
    require(low <= high, f"{where}={bounds}: nothing is in it; expected [lowest, highest]")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class TableConfig:
    image: str = "filepath"
    """Column of the paths of image files, relative to the table's folder."""
    caption: str = "title"
    """Column of the captions."""


@dataclass
class AugmentConfig:
    scale: list[float] = field(default_factory=lambda: [0.9, 1.0])
    """Area of the random crop as a share of the image, [smallest, largest] (OpenCLIP's default)."""
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Aspect ratio of the random crop, [smallest, largest]."""
    flip: float = 0.0
    """Probability of a horizontal flip. Leave at 0 where captions speak of left and right."""
    color_jitter: list[float] = field(default_factory=list)
    """Strengths [brightness, contrast, saturation, hue]; empty for none."""
    color_jitter_prob: float = 0.8
    """Probability that a sample's colours are jittered, where `color_jitter` is set."""
    grayscale: float = 0.0
    """Probability that a sample loses its colours."""

    def __post_init__(self) -> None:
        for name in ("scale", "ratio"):
            pair = getattr(self, name)
            require(
                len(pair) == 2 and 0 < pair[0] <= pair[1] < math.inf,
                f"data.augment.{name}={pair}: expected [smallest, largest], both positive and finite",
            )
        require(self.scale[1] <= 1, f"data.augment.scale={self.scale}: a crop is at most the whole image, 1.0")
        require(
            len(self.color_jitter) in (0, 4),
            f"data.augment.color_jitter={self.color_jitter}: expected none or 4 numbers, "
            "[brightness, contrast, saturation, hue]",
        )
        for name in ("flip", "color_jitter_prob", "grayscale"):
            p = getattr(self, name)
            require(0 <= p <= 1, f"data.augment.{name}={p}: expected a probability in [0, 1]")


@dataclass
class SourceConfig:
    shards: Any = MISSING
    """As `data.shards`."""
    weight: float = 1.0
    """Its share of the samples, relative to the other sources' weights."""
    passes: int | None = None
    """Passes over it at most, after which the others go on alone; None for no end."""
    image: str | None = None
    """As `data.image`, which it is where None."""
    caption: CaptionConfig | None = None
    """As `data.caption`, which it is where None."""
    table: TableConfig | None = None
    """As `data.table`, which it is where None."""
    filter: FilterConfig | None = None
    """As `data.filter`, which it is where None."""


def _check_source(where: str, source: SourceConfig) -> None:
    strings(f"{where}.shards", source.shards)
    require(0 < source.weight < math.inf, f"{where}.weight={source.weight}: expected a positive number")
    require(source.passes is None or source.passes >= 1, f"{where}.passes={source.passes}: expected 1 or more, or null")


@dataclass
class DataConfig:
    name: str = MISSING
    """Short name of the data set; part of the default run name."""
    root: str | None = None
    """Folder of the data set, for `shards` and evaluation to refer to. The built-in set needs none."""
    shards: Any = MISSING
    """Training shards (.tar, .tar.gz), or tables of image files and captions (.csv, .tsv, .parquet): a path, a
    `{00000..00099}` range, a glob, or a list of them."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """In place of `shards`: name -> shards that are mixed, each with a weight of its own."""
    image: str = "jpg;jpeg;png;webp"
    """Member extensions that hold the image, first match wins, separated by semicolons."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Where captions are and how one is chosen."""
    table: TableConfig = field(default_factory=TableConfig)
    """Where `shards` are tables: their columns."""
    filter: FilterConfig = field(default_factory=FilterConfig)
    """Which samples are left out."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Training augmentation."""
    workers: int | None = None
    """Loader processes for each rank; None takes the CPU cores of this rank less one, between 1 and 14. 0 loads in the
    training process."""
    cache: str | None = None
    """Folder on a disk of each host in which remote shards (http, s3, gs and so on) are kept once they were read, for
    later passes and runs. None keeps none."""
    cache_gb: float | None = None
    """GB (10^9 bytes) that `cache` may take, what is being written included; well above `lanes` shards."""
    max_lost: float = 0.05
    """Share of the samples, and of the shards, that may be unreadable before the run ends; of the last 50,000 to
    100,000 samples and 500 to 1000 shards of each rank."""
    prefetch: int = 4
    """Batches that are kept ready."""
    lanes: int | None = None
    """Shards that are read side by side, a multiple of the number of ranks. With `seed` and `shuffle` it sets the order
    of samples, which depends neither on ranks nor on processes. None takes as many as there are shards, at most 96."""
    shuffle: int = 1024
    """Samples (encoded) that each lane shuffles at a time; 1 keeps the order of the shard."""

    def __post_init__(self) -> None:
        require(
            (self.shards is None) != (not self.sources),
            "data.shards and data.sources: set exactly one of them; data=mix leaves data.shards empty",
        )
        if self.shards is not None:
            strings("data.shards", self.shards)
        for name, source in self.sources.items():
            _check_source(f"data.sources.{name}", source)
        require(
            not self.sources or any(source.passes is None for source in self.sources.values()),
            "data.sources: each has `passes`, and the length of a run is `steps`: leave one source without",
        )
        require(self.workers is None or self.workers >= 0, f"data.workers={self.workers}: expected 0 or more")
        require(
            (self.cache is None) == (self.cache_gb is None),
            f"data.cache={self.cache} with data.cache_gb={self.cache_gb}: expected both or neither: the folder that "
            "keeps remote shards, and how much of its disk it may take, as in data.cache=/scratch/x data.cache_gb=200",
        )
        require(self.cache != "", "data.cache is empty: expected a folder, or null")
        require(
            self.cache_gb is None or 0 < self.cache_gb < math.inf,
            f"data.cache_gb={self.cache_gb}: expected a positive number of GB",
        )
        require(0 <= self.max_lost <= 1, f"data.max_lost={self.max_lost}: expected a share in [0, 1]")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: expected 1 or more")
        require(self.lanes is None or self.lanes >= 1, f"data.lanes={self.lanes}: expected 1 or more, or null")
        require(self.shuffle >= 1, f"data.shuffle={self.shuffle}: expected 1 or more")
