"""Linear probe (Radford et al. 2021): what a linear classifier makes of the image features."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from clipq.data.evalset import EvalFaults, Source, first_targets
from clipq.data.parallel import cores
from clipq.dist.gather import gather_objects, gather_rows
from clipq.eval.common import Encoder, EvalError, EvalResult

log = logging.getLogger(__name__)

Score = TypeVar("Score", float, tuple[float, float])

PER_DECADE, DECADES = 8, 6
"""The grid of strengths: 8 in each factor of ten, from 1e-6 to 1e6."""
MOST_FITS = 16
"""7 coarse ones, 2 in each of 4 finer rounds, and the last on all training images."""
ITERATIONS = 1000
TOLERANCE = 1e-4
HELD_OUT = 0.2


def search_strength(score: Callable[[float], Score]) -> float:
    """The L2 strength of the highest score, by the search of Radford et al. 2021, appendix A.3.

    It tries 1e-6, 1e-4 … 1e6, then twice as close on both sides of the best so far, down to 8 steps in a decade: at
    most 15 calls of `score`. Of equal scores it takes the one tried first, and of the coarse ones the strongest.
    """
    far = PER_DECADE * DECADES
    step = 2 * PER_DECADE
    scores: dict[int, Score] = {}
    new = list(range(far, -far - 1, -step))
    while True:
        scores |= {e: score(10 ** (e / PER_DECADE)) for e in new}
        best = max(scores, key=scores.__getitem__)
        if step == 1:
            return 10 ** (best / PER_DECADE)
        step //= 2
        new = [e for e in (best + step, best - step) if abs(e) <= far]


def held_out(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of N training images choose the strength, [N] bool: a fifth of each class, the same ones each time.

    At least one of a class and never all of it, so that both parts have all classes; none of a class of one image.
    """
    chosen = np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(0).permutation(len(labels))
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        chosen[of_class[: min(max(1, round(HELD_OUT * len(of_class))), len(of_class) - 1)]] = True
    return chosen


def fit(features: NDArray[np.float64], labels: NDArray[np.int64], strength: float, threads: int = 1) -> Any:
    """scikit-learn's logistic regression with L-BFGS, at most 1000 iterations.

    It minimises the sum of the images' losses plus strength / 2 times the sum of squared weights.

    scikit-learn ends where no entry of the gradient of the mean loss is above `tol`. With features of norm 1 and many
    classes its default of 1e-4 is reached before anything is learnt, for entries are about 1 / (classes · √D) to begin
    with: here they have to fall to a ten-thousandth of the largest at zero weights.

    Args:
        features: [N, D].
        labels: [N] class numbers, of two classes at least.
        strength: of the L2 penalty.
        threads: of BLAS; torchrun gives a process one, though the other ranks only wait.
    """
    linear_model = _linear_model()
    from threadpoolctl import threadpool_limits  # pyright: ignore[reportMissingImports]  (scikit-learn brings it)

    mean = features.mean(0)
    slopes = [(labels == c).mean() * np.abs(mean - features[labels == c].mean(0)).max() for c in np.unique(labels)]
    tolerance = max(TOLERANCE * float(max(slopes)), np.finfo(np.float64).tiny)  # zero where all features are equal
    model = linear_model.LogisticRegression(C=1 / strength, tol=tolerance, max_iter=ITERATIONS)
    with warnings.catch_warnings(), threadpool_limits(threads, user_api="blas"):
        warnings.simplefilter("ignore")  # of the iterations, at strengths that are not chosen
        return model.fit(features, labels)


@dataclass(frozen=True)
class Features:
    """Of a whole source, on one rank."""

    rows: NDArray[np.float64]
    """[N, D], unit norm, in the order of the samples' names."""
    labels: NDArray[np.int64]
    """[N] class numbers."""


@dataclass
class LinearProbe:
    """Accuracy on test images of a logistic regression over the features of training images.

    Features are what `Encoder.images` gives: in the space shared with texts, unit norm, of images as evaluations see
    them, without augmentation; CLIP_benchmark takes the same, and trains with AdamW. Radford et al. 2021 (appendix A.3)
    took those of ViTs before the projection into that space, of any norm, which gives other numbers. As theirs: L-BFGS
    for at most 1000 iterations, the L2 strength by a search on held-out training images, and a last fit on all of them.
    The paper has a validation split for some data sets; here it is a fifth of each class's training images, by a fixed
    seed.

    Every rank computes features; rank 0 fits. The others wait for one fit at a time, which therefore has to end within
    `parallel.timeout_minutes`, and a signal ends the evaluation between two. Every rank has all features of a source
    on its device for a moment: N · D · 4 bytes.
    """

    task: str
    train: Source
    source: Source
    """The test images."""

    def check(self) -> None:
        """See `Evaluator.check`."""
        try:
            _linear_model()
        except ImportError as error:
            raise EvalError(
                f"evaluation {self.task}: a linear probe takes scikit-learn ({error}): pip install 'clipq[probe]'"
            ) from error
        where = f"eval.tasks.{self.task}"
        for source, what, names in (
            (self.train, "training data", f"{where}.train_shards (or {where}.train_folder, {where}.train_split)"),
            (self.source, "test data", f"{where}.shards (or {where}.folder, {where}.split)"),
        ):
            try:
                first_targets(source)
            except ValueError as error:
                raise EvalError(f"evaluation {self.task}, {what}: {error}. Check {where}.image and {names}") from error

    def run(self, encoder: Encoder) -> EvalResult:
        """Metrics: top1, top5 (of more than 5 classes), mean_per_class, chance, all in [0, 1]; l2_strength, in the
        units of `fit`; images, train_images; failed and broken_shards, of both sources.

        Raises:
            EvalError: no image at all in a source, a feature that is not finite, a single class, a class of test images
                without training images, or none with two of them.
        """
        faults = EvalFaults()
        with encoder.evaluating():
            train = self._features(encoder, self.train, "training", faults)
            test = self._features(encoder, self.source, "test", faults)
        self._check_classes(train.labels, test.labels)
        chosen = held_out(train.labels)
        if not chosen.any():
            raise EvalError(
                f"evaluation {self.task}: no class has two training images, and the L2 strength is chosen on some that "
                "are held out"
            )
        threads = max(1, cores() - encoder.env.local_world_size + 1)  # a core for each rank that waits
        fits = iter(range(1, MOST_FITS + 1))

        def on_main(strength: float, compute: Callable[[], Any]) -> Any:
            """Rank 0's result, on every rank."""
            encoder.stop.agree()
            shown = f"fit {next(fits)} of at most {MOST_FITS}, L2 strength {strength:.3g}"
            encoder.status(f"{self.task}: {shown}, {len(train.labels):,} training images")
            return gather_objects(compute() if encoder.env.is_main else None)[0]

        def validate(strength: float) -> tuple[float, float]:
            return on_main(strength, lambda: _validate(train, chosen, strength, threads))

        strength = search_strength(validate)
        metrics: dict[str, float] = on_main(strength, lambda: self._metrics(train, test, strength, threads))
        metrics |= {
            "l2_strength": strength,
            "images": len(test.labels),
            "train_images": len(train.labels),
            **faults.metrics(),
        }
        return EvalResult(self.task, "linear_probe", metrics)

    def _features(self, encoder: Encoder, source: Source, which: str, faults: EvalFaults) -> Features:
        """Of all ranks; rows on rank 0 only. Adds to `faults`."""
        features, targets, own = [], [], EvalFaults()
        for batch in encoder.batches(_Named(source), f"{self.task}, {which} images"):
            own.add(batch["faults"])
            if batch["target"]:
                features.append(encoder.images(batch["image"]))
                targets += batch["target"]
        encoder.stop.agree()
        finite = all(bool(part.isfinite().all()) for part in features)
        width = features[0].shape[1] if features else 0
        everyone = gather_objects((targets, own, finite, width))
        faults.add(EvalFaults.of_all([of_rank for _, of_rank, _, _ in everyone]))
        # What every rank knows is raised on every rank.
        if not any(of_rank for of_rank, _, _, _ in everyone):
            raise EvalError(f"evaluation {self.task}: no {which} image could be read (see the warnings before)")
        if not all(of_rank for _, _, of_rank, _ in everyone):
            raise EvalError(f"evaluation {self.task}: features of {which} images are NaN or infinite")
        width = max(of_rank for _, _, _, of_rank in everyone)
        empty = torch.empty(0, width, device=encoder.env.device)
        rows = gather_rows(torch.cat(features) if features else empty)
        # By name, so that the held-out images are the same for any number of ranks and loader processes.
        named = [target for of_rank, _, _, _ in everyone for target in of_rank]
        order = sorted(range(len(named)), key=lambda i: named[i][1])
        labels = np.array([named[i][0] for i in order], dtype=np.int64)
        if not encoder.env.is_main:
            return Features(np.empty((0, width)), labels)
        return Features(rows.cpu().numpy()[order].astype(np.float64), labels)

    def _check_classes(self, train: NDArray[np.int64], test: NDArray[np.int64]) -> None:
        classes = np.unique(train)
        if len(classes) < 2:
            raise EvalError(f"evaluation {self.task}: all training images have class {classes[0]}: expected 2 or more")
        strange = np.setdiff1d(test, classes)
        if len(strange):
            raise EvalError(
                f"evaluation {self.task}: a test image has class {strange[0]}, which no training image has: training "
                f"and test data must number their classes alike ({len(classes)} in training, {len(strange)} beside)"
            )

    def _metrics(self, train: Features, test: Features, strength: float, threads: int) -> dict[str, float]:
        model = fit(train.rows, train.labels, strength, threads)
        if model.n_iter_.max() >= ITERATIONS:
            log.warning("%s: the last fit was not done after %d iterations, as many as it has", self.task, ITERATIONS)
        right = model.predict(test.rows) == test.labels
        metrics = {"top1": float(right.mean())}
        if len(model.classes_) > 5:
            best = np.argsort(-model.decision_function(test.rows), axis=1)[:, :5]
            metrics["top5"] = float((model.classes_[best] == test.labels[:, None]).any(1).mean())
        metrics["mean_per_class"] = float(np.mean([right[test.labels == c].mean() for c in np.unique(test.labels)]))
        metrics["chance"] = 1 / len(model.classes_)
        return metrics


@dataclass(frozen=True)
class _Named:
    """A source whose targets come with the names of their samples."""

    source: Source

    @property
    def settings(self) -> tuple[str, ...]:
        return self.source.settings

    def share(self, lane: int, lanes: int) -> Iterator[tuple[str, bytes, Any]]:
        for name, data, target in self.source.share(lane, lanes):
            yield name, data, target if isinstance(target, ValueError) else (target, name)


def _validate(train: Features, chosen: NDArray[np.bool_], strength: float, threads: int) -> tuple[float, float]:
    """Accuracy on the chosen images of a fit on the others; where it is equal, a higher likelihood is better."""
    model = fit(train.rows[~chosen], train.labels[~chosen], strength, threads)
    rows, labels = train.rows[chosen], train.labels[chosen]
    with np.errstate(divide="ignore"):  # a probability of zero
        scores = model.predict_log_proba(rows)
    own = np.searchsorted(model.classes_, labels)
    return float((scores.argmax(1) == own).mean()), float(scores[np.arange(len(own)), own].mean())


def _linear_model() -> Any:
    import sklearn.linear_model  # pyright: ignore[reportMissingImports]

    return sklearn.linear_model
