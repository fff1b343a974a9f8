"""Zero-shot classification (Radford et al. 2021): the class whose prompts lie nearest to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipq.data.evalset import EvalFaults, Source
from clipq.dist.gather import gather_objects, gather_rows
from clipq.eval.common import Encoder, EvalError, EvalResult, ExampleKeeper, look_at
from clipq.eval.prompts import Templates, prompts

CONFUSED, PAIRS = 2000, 50
"""Classes up to which pairs of them are counted, and pairs that are told."""


def build_classifier(encoder: Encoder, classnames: list[str], templates: Templates) -> Tensor:
    """Weights of the zero-shot classifier, [classes, D] fp32, unit norm; classes are shared out over the ranks.

    A class is the normalised mean of the unit-norm features of its prompts.
    """
    sentences = [prompts(name, templates) for name in classnames]
    key = tuple(map(tuple, sentences))
    if encoder.classifiers is None:
        return _classifier(encoder, sentences)
    if key not in encoder.classifiers:
        encoder.classifiers[key] = _classifier(encoder, sentences)
    return encoder.classifiers[key]


def _classifier(encoder: Encoder, sentences: list[list[str]]) -> Tensor:
    env = encoder.env
    mine = list(range(env.rank, len(sentences), env.world_size))
    features, done = [], 0
    for some in _batches([sentences[c] for c in mine], encoder.batch_size):
        encoded = encoder.texts([text for own in some for text in own])
        if encoder.stop.asked:
            break
        features += [part.mean(0) for part in encoded.split([len(own) for own in some])]
        done += len(some)
        encoder.status(f"classifier: {done:,} of {len(mine):,} class names on this rank")
    width = len(features[0]) if features else int(encoder.texts(["a"]).shape[1])
    weights = torch.stack(features) if features else torch.empty(0, width, device=env.device)
    encoder.stop.agree()
    everyone = gather_rows(F.normalize(weights, dim=-1))
    numbers = gather_rows(torch.tensor(mine, device=env.device, dtype=torch.long))
    return everyone[numbers.argsort()]


def _batches(sentences: list[list[str]], size: int) -> Iterator[list[list[str]]]:
    """Classes with at most so many sentences together, one class at least."""
    some: list[list[str]] = []
    for own in sentences:
        if some and sum(map(len, some)) + len(own) > size:
            yield some
            some = []
        some.append(own)
    if some:
        yield some


class _Tally:
    """What is counted of the images of one rank, and those of them that are kept as examples."""

    def __init__(self, encoder: Encoder, classes: int, examples: int) -> None:
        n, device = classes, encoder.env.device
        self.counts_3C = torch.zeros(3, n, dtype=torch.long, device=device)
        """Of each class: images, right at 1, right within 5."""
        self.taken_for = torch.zeros(n * n if n <= CONFUSED else 0, dtype=torch.long, device=device)
        """Images of class i that are taken for class j at [n·i + j]."""
        shown = examples if encoder.env.is_main else 0
        self.examples, self.mistakes = (ExampleKeeper(shown, encoder.mean, encoder.std) for _ in range(2))
        self._before: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def add(self, images: Tensor, labels_B: Tensor, logits_BC: Tensor) -> None:
        n = logits_BC.shape[1]
        best = logits_BC.topk(min(5, n), dim=1).indices
        # of NaN the first classes would be the best
        right = (best == labels_B[:, None]) & logits_BC.isfinite().all(1, keepdim=True)
        ones = torch.ones_like(labels_B)
        self.counts_3C[0].index_add_(0, labels_B, ones)
        self.counts_3C[1].index_add_(0, labels_B, right[:, 0].long())
        self.counts_3C[2].index_add_(0, labels_B, right.any(1).long())
        if len(self.taken_for):
            self.taken_for.index_add_(0, labels_B * n + best[:, 0], ones)
        if self.examples.count:
            self.examples.offer(images, _notes(labels_B, logits_BC))
            self.offer_mistakes()  # of the batch before, whose numbers the device has by now
            self._before = images, labels_B, logits_BC, ~right[:, 0]

    def offer_mistakes(self) -> None:
        if self._before is not None:
            images, labels, logits, wrong = self._before
            self.mistakes.offer(images, _notes(labels, logits), among=wrong.nonzero()[:, 0].tolist())
            self._before = None

    def reduce(self) -> None:
        """Sums the counts of all ranks. Collective."""
        dist.all_reduce(self.counts_3C)
        dist.all_reduce(self.taken_for)


def _notes(labels: Tensor, logits: Tensor) -> Callable[[int], Any]:
    return lambda i: (int(labels[i]), logits[i].cpu())


@dataclass
class ZeroShot:
    """Top-1, top-5 and mean per-class accuracy over all classes, and top-1 on subsets of classes."""

    task: str
    source: Source
    classnames: list[str]
    templates: Templates
    subsets: dict[str, list[int]] = field(default_factory=dict)
    """Name -> class numbers; images of these classes are scored against all classes."""
    examples: int = 0

    def check(self) -> None:
        """See `Evaluator.check`."""
        targets = look_at(self.task, self.source)
        strange = next((c for c in targets if not 0 <= c < len(self.classnames)), None)
        if strange is not None:
            raise self._strange(strange)

    def run(self, encoder: Encoder) -> EvalResult:
        """Metrics: top1, top5, mean_per_class, `<subset>_top1`, all in [0, 1]; chance, images, failed, broken_shards.

        Raises:
            EvalError: a class number outside the class names, or no image at all.
        """
        with encoder.evaluating():
            weights_CD = build_classifier(encoder, self.classnames, self.templates)
            tally = _Tally(encoder, len(self.classnames), self.examples)
            faults, strange = EvalFaults(), None
            for batch in encoder.batches(self.source, self.task):
                faults.add(batch["faults"])
                strange = next((c for c in batch["target"] if not 0 <= c < len(self.classnames)), None)
                if strange is not None:
                    break
                if batch["target"]:
                    labels_B = torch.tensor(batch["target"], device=encoder.env.device)
                    tally.add(batch["image"], labels_B, encoder.images(batch["image"]) @ weights_CD.T)
            tally.offer_mistakes()
            encoder.stop.agree()
            # Raised on every rank, where one alone would leave the others waiting.
            everyone = gather_objects((faults, strange))
            if any(label is not None for _, label in everyone):
                raise self._strange(next(label for _, label in everyone if label is not None))
            if encoder.env.is_distributed:
                tally.reduce()
        counts = tally.counts_3C.cpu()
        return EvalResult(
            self.task,
            "zero_shot",
            self._metrics(counts, EvalFaults.of_all([of_rank for of_rank, _ in everyone])),
            examples=self._examples(tally.examples),
            mistakes=self._examples(tally.mistakes),
            classes=self._classes(counts),
            confusions=self._confusions(tally.taken_for.cpu()),
        )

    def _strange(self, label: int) -> EvalError:
        n = len(self.classnames)
        return EvalError(
            f"evaluation {self.task}: an image has class {label}, but the {n} class names are of classes 0 to {n - 1}: "
            f"name the list of this data set in eval.tasks.{self.task}.classnames"
        )

    def _metrics(self, counts: Tensor, faults: EvalFaults) -> dict[str, float]:
        images, top1, top5 = counts.double()
        total = images.sum().item()
        if total == 0:
            raise EvalError(f"evaluation {self.task}: no image could be read (see the warnings before)")
        occurs = images > 0
        metrics = {
            "top1": top1.sum().item() / total,
            "top5": top5.sum().item() / total,
            "mean_per_class": (top1[occurs] / images[occurs]).mean().item(),
            "chance": 1 / len(self.classnames),
            "images": int(total),
            **faults.metrics(),
        }
        if len(self.classnames) <= 5:
            del metrics["top5"]  # it would be 1 whatever the model
        for name, classes in self.subsets.items():
            of_subset = images[classes].sum().item()
            if of_subset == 0:
                raise EvalError(f"evaluation {self.task}: no image belongs to a class of subset {name}")
            metrics[f"{name}_top1"] = top1[classes].sum().item() / of_subset
        return metrics

    def _classes(self, counts: Tensor) -> list[dict]:
        images, top1, _ = counts.tolist()
        return [
            {"name": name, "images": seen, "top1": right / seen if seen else None}
            for name, seen, right in zip(self.classnames, images, top1, strict=True)
        ]

    def _confusions(self, taken_for: Tensor) -> list[dict]:
        """Nothing where there are too many classes to count pairs of them."""
        if not len(taken_for):
            return []
        n = len(self.classnames)
        pairs = taken_for.clone().view(n, n).fill_diagonal_(0).flatten()
        images, numbers = pairs.topk(min(PAIRS, n * n))
        return [
            {"truth": self.classnames[at // n], "taken_for": self.classnames[at % n], "images": count}
            for count, at in zip(images.tolist(), numbers.tolist(), strict=True)
            if count
        ]

    def _examples(self, keeper: ExampleKeeper) -> list[dict]:
        examples = []
        for uri, (label, logits) in keeper.kept():
            scores, classes = logits.topk(min(5, len(self.classnames)))
            best = [[self.classnames[c], s] for c, s in zip(classes.tolist(), scores.tolist(), strict=True)]
            examples.append({"image": uri, "truth": self.classnames[label], "best": best})
        return examples
