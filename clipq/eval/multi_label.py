"""Zero-shot classification of images that show several classes: average precision of each class over all images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipq.data.evalset import EvalFaults, Source
from clipq.dist.gather import gather_objects, gather_rows
from clipq.eval.common import Encoder, EvalError, EvalResult, ExampleKeeper, look_at
from clipq.eval.prompts import Templates
from clipq.eval.zero_shot import build_classifier


def average_precisions(scores_NC: Tensor, truth_NC: Tensor) -> Tensor:
    """Average precision of each class, [C] float64; NaN for a class that no image shows.

    With images in the order of their scores it is the mean, over the images that show the class, of the share of those
    that do among all up to there. Images whose scores tie are taken together, so that the order in which they come does
    not count, and a model whose scores have all become equal, or NaN, reaches the share of images that show the class.

    Args:
        scores_NC: [N, C], any float dtype.
        truth_NC: [N, C] bool.
    """
    scores_NC = scores_NC.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    ranked, order = scores_NC.sort(dim=0, descending=True)
    found = truth_NC.gather(0, order).double().cumsum(0)
    # Groups of ties end where the next score is another.
    ends = torch.cat([ranked[1:] != ranked[:-1], torch.ones_like(truth_NC[:1])])
    values = []
    for c in range(scores_NC.shape[1]):
        (last,) = ends[:, c].nonzero(as_tuple=True)
        until = found[last, c]
        of_group = until.diff(prepend=until.new_zeros(1))
        values.append((of_group * until / (last + 1)).sum() / until[-1])
    return torch.stack(values)


@dataclass
class MultiLabel:
    """Mean over the classes of their average precision."""

    task: str
    source: Source
    """Its targets are arrays of bool, [C]: which of the classes an image shows."""
    classnames: list[str]
    templates: Templates
    examples: int = 0

    def check(self) -> None:
        """See `Evaluator.check`."""
        targets = look_at(self.task, self.source)
        strange = next((len(t) for t in targets if len(t) != len(self.classnames)), None)
        if strange is not None:
            raise self._strange(strange)

    def run(self, encoder: Encoder) -> EvalResult:
        """Metrics: mean_average_precision over the classes that occur, and its chance, in [0, 1]; images, failed,
        broken_shards.

        Raises:
            EvalError: labels of another number of classes than there are names, or no image that shows any.
        """
        device, n = encoder.env.device, len(self.classnames)
        with encoder.evaluating():
            weights_CD = build_classifier(encoder, self.classnames, self.templates)
            scores, truth = [torch.empty(0, n, device=device)], [torch.empty(0, n, dtype=torch.uint8, device=device)]
            faults, strange = EvalFaults(), None
            keeper = ExampleKeeper(self.examples if encoder.env.is_main else 0, encoder.mean, encoder.std)
            for batch in encoder.batches(self.source, self.task):
                faults.add(batch["faults"])
                strange = next((len(t) for t in batch["target"] if len(t) != n), None)
                if strange is not None:
                    break
                if not batch["target"]:
                    continue
                labels_BC = torch.stack([torch.from_numpy(t) for t in batch["target"]])
                scores_BC = encoder.images(batch["image"]) @ weights_CD.T
                scores.append(scores_BC)
                truth.append(labels_BC.to(device, torch.uint8))
                keeper.offer(batch["image"], lambda i, s=scores_BC, t=labels_BC: (t[i], s[i].cpu()))
            encoder.stop.agree()
            # Raised on every rank, where one alone would leave the others waiting.
            everyone = gather_objects((faults, strange))
            if any(found is not None for _, found in everyone):
                raise self._strange(next(found for _, found in everyone if found is not None))
            all_scores, all_truth = gather_rows(torch.cat(scores)).cpu(), gather_rows(torch.cat(truth)).cpu().bool()
        metrics = self._metrics(all_scores, all_truth, EvalFaults.of_all([of_rank for of_rank, _ in everyone]))
        return EvalResult(self.task, "multi_label", metrics, self._examples(keeper))

    def _metrics(self, scores: Tensor, truth: Tensor, faults: EvalFaults) -> dict[str, float]:
        if not truth.any():
            what = "no image shows any class" if len(truth) else "no image could be read (see the warnings before)"
            raise EvalError(f"evaluation {self.task}: {what}")
        occurs = truth.any(0)
        return {
            "mean_average_precision": average_precisions(scores[:, occurs], truth[:, occurs]).mean().item(),
            "chance": truth[:, occurs].double().mean().item(),
            "images": len(truth),
            **faults.metrics(),
        }

    def _strange(self, classes: int) -> EvalError:
        return EvalError(
            f"evaluation {self.task}: an image has labels of {classes} classes, but there are {len(self.classnames)} "
            f"class names: name the list of this data set in eval.tasks.{self.task}.classnames"
        )

    def _examples(self, keeper: ExampleKeeper) -> list[dict]:
        examples = []
        for uri, (labels, scores) in keeper.kept():
            shown = [name for name, there in zip(self.classnames, labels.tolist(), strict=True) if there]
            best = scores.topk(min(5, len(self.classnames)))
            names = [self.classnames[c] for c in best.indices.tolist()]
            pairs = [list(pair) for pair in zip(names, best.values.tolist(), strict=True)]
            examples.append({"image": uri, "truth": shown, "best": pairs})
        return examples
