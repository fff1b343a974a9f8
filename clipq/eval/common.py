"""What evaluators share: the model as an encoder, results, and images kept as examples."""

from __future__ import annotations

import base64
import io
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from clipq.data.evalset import EvalStream, Source, first_targets
from clipq.data.loader import Tokenizer, make_loader
from clipq.dist.env import DistEnv
from clipq.dist.stop import Stop
from clipq.lowp import quantized_once


@dataclass(frozen=True)
class Encoder:
    """A CLIP model seen as two functions to unit-norm features, with all that they need."""

    model: nn.Module
    tokenizer: Tokenizer
    transform: Callable[[Image.Image], Tensor]
    """OpenCLIP's evaluation transform: PIL image -> normalised [3, H, W]."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    env: DistEnv
    autocast: torch.dtype | None = None
    """Autocast to this dtype; None computes in the weights' own."""
    batch_size: int = 256
    workers: int = 1
    status: Callable[[str], None] = field(default=lambda text: None)
    """Is told how far an evaluation has come."""
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    """Collective; within, every rank may use the model as often as its own share takes."""
    classifiers: dict[Any, Tensor] | None = None
    """Zero-shot classifiers by their sentences, of a model that does not change; None where it trains."""
    compiled: bool = False
    """Use compiled blocks, if there are any."""
    stop: Stop = field(default_factory=Stop)
    """What may break an evaluation off: this rank then leaves out the rest of its share, and all end as they `agree`
    on it before they next need each other's part."""

    def images(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] on any device -> [B, D] fp32, unit norm, on the model's device."""
        with self._autocast():
            features = self.model.encode_image(images.to(self.env.device, non_blocking=True))  # pyright: ignore[reportCallIssue]
        return F.normalize(features.float(), dim=-1)

    def texts(self, texts: list[str]) -> Tensor:
        """N strings -> [N, D] fp32, unit norm, on the model's device; encoded `batch_size` at a time.

        Fewer where the evaluation is broken off.
        """
        parts = []
        for first in range(0, len(texts), self.batch_size):
            if parts and self.stop.asked:
                break
            tokens = self.tokenizer(texts[first : first + self.batch_size]).to(self.env.device)
            with self._autocast():
                parts.append(self.model.encode_text(tokens).float())  # pyright: ignore[reportCallIssue]
        return F.normalize(torch.cat(parts), dim=-1)

    def batches(self, source: Source, task: str) -> Iterator[dict[str, Any]]:
        """This rank's share of a source, in batches, as `EvalStream` yields them, as far as it is not broken off."""
        stream = EvalStream(source, self.transform, self.batch_size, self.env.rank, self.env.world_size)
        pin = self.env.device.type == "cuda"
        start, done = time.perf_counter(), 0
        for batch in make_loader(stream, workers=self.workers, pin_memory=pin):
            if self.stop.asked:
                return
            yield batch
            done += len(batch["target"])
            self.status(f"{task}: {done:,} images, {done / (time.perf_counter() - start):,.0f} img/s on this rank")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.env.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, no gradients, low-precision weights quantized once; eager where the model trains, for the shapes
        here would make torch.compile compile again."""
        training = self.model.training
        self.model.eval()
        stance = "default" if self.compiled else "force_eager"
        try:
            with self.whole(), torch.inference_mode(), quantized_once(self.model), torch.compiler.set_stance(stance):
                yield
        finally:
            self.model.train(training)


def shown(metric: str, value: float) -> str:
    """A metric for people: shares in per cent, counts and strengths as they are."""
    if metric.endswith("_strength"):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else f"{100 * value:.2f}%"


@dataclass
class EvalResult:
    """What an evaluator found."""

    task: str
    kind: str
    metrics: dict[str, float]
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Of some images, on rank 0 alone: {"image": data URI of a PNG, "truth": str or list of str, "best": [[caption,
    score], …]}."""
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    """The same of images that were taken for something else."""
    classes: list[dict[str, Any]] = field(default_factory=list)
    """{"name": str, "images": int, "top1": float or None} of each class, by its number."""
    confusions: list[dict[str, Any]] = field(default_factory=list)
    """{"truth": str, "taken_for": str, "images": int} of pairs of classes, the most frequent first."""

    @property
    def main(self) -> tuple[str, float]:
        """The metric that stands for the task in an average, and its value."""
        both = ("image_to_text_r1", "text_to_image_r1")
        if all(name in self.metrics for name in both):
            return "mean_r1", sum(self.metrics[name] for name in both) / 2
        name = next(name for name in ("top1", "mean_average_precision") if name in self.metrics)
        return name, self.metrics[name]

    def summary(self) -> str:
        """One line: shares in per cent, counts as they are."""
        counts = ("images", "texts", "train_images", "failed", "broken_shards")
        parts = [f"{k} {shown(k, v)}" for k, v in self.metrics.items() if k not in counts]
        parts += [f"{self.metrics[k]:,.0f} {k.replace('_', ' ')}" for k in counts if self.metrics.get(k)]
        return f"{self.task}: " + ", ".join(parts)

    def write_examples(self, folder: Path, step: int) -> None:
        """Writes `<folder>/<task>.json` in place of an older one."""
        folder.mkdir(parents=True, exist_ok=True)
        record = {"task": self.task, "step": step, "kind": self.kind, "examples": self.examples}
        part = folder / f".{self.task}.json.part"
        part.write_text(json.dumps(record))
        part.replace(folder / f"{self.task}.json")


class EvalError(ValueError):
    """A task cannot be evaluated on its data; the message says which and why."""


class Evaluator(Protocol):
    """One evaluation task."""

    task: str

    def check(self) -> None:
        """Looks at the first samples, so that a wrong setting is found before a model is built.

        Raises:
            EvalError: `run` could not use them.
        """
        ...

    def run(self, encoder: Encoder) -> EvalResult:
        """Called on every rank; returns the same metrics, or raises the same EvalError or Stopped, on every rank."""
        ...


def look_at(task: str, source: Source) -> list[Any]:
    """Targets of the first samples of a task.

    Raises:
        EvalError: none can be used; it names the settings that they come from.
    """
    try:
        return first_targets(source)
    except ValueError as error:
        *others, last = [f"eval.tasks.{task}.{name}" for name in source.settings]
        where = f"{', '.join(others)}{' and ' if others else ''}{last}"
        raise EvalError(f"evaluation {task}: {error}. Check {where}") from error


class ExampleKeeper:
    """A random choice of `count` images of a stream of unknown length (reservoir sampling), the same each time."""

    def __init__(self, count: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.count = count
        self._mean, self._std = mean, std
        self._rng = random.Random(0)
        self._seen = 0
        self._kept: list[tuple[Tensor, Any]] = []

    def offer(self, images: Tensor, notes: Callable[[int], Any], among: Iterable[int] | None = None) -> None:
        """Considers a batch of normalised images, or those of them `among` which the choice is; `notes(i)` is asked for
        only where image i is kept."""
        for i in range(images.shape[0]) if among is None else among:
            slot = self._seen if self._seen < self.count else self._rng.randint(0, self._seen)
            self._seen += 1
            if slot < self.count:
                entry = (images[i].clone(), notes(i))
                self._kept[slot : slot + 1] = [entry]

    def kept(self) -> list[tuple[str, Any]]:
        """(data URI of a PNG, notes) of the images kept."""
        return [(self._data_uri(image), note) for image, note in self._kept]

    def _data_uri(self, image: Tensor) -> str:
        shape = (-1, 1, 1)
        rgb = image.cpu() * torch.tensor(self._std).view(shape) + torch.tensor(self._mean).view(shape)
        array = (rgb.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
