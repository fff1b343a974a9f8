"""Image-text retrieval: recall at 1, 5 and 10, both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipq.data.evalset import EvalFaults, Source
from clipq.dist.gather import gather_objects, gather_rows
from clipq.eval.common import Encoder, EvalError, EvalResult, ExampleKeeper, look_at

AT = (1, 5, 10)


def recalls(image_ID: Tensor, text_TD: Tensor, image_of_text_T: Tensor, chunk: int = 1024) -> dict[str, float]:
    """Recall at k of both directions.

    An image is found at k if one of its own texts is among the k nearest texts; a text, if its image is among the k
    nearest images. What ties with the right answer counts as nearer, so that a model whose features have all become
    equal, or NaN, scores 0.

    Args:
        image_ID: [I, D] unit-norm image features.
        text_TD: [T, D] unit-norm text features.
        image_of_text_T: [T] number of the image that each text belongs to.
        chunk: rows of the similarity matrix computed at a time.
    """
    found = {f"{way}_r{k}": 0 for way in ("image_to_text", "text_to_image") for k in AT}
    numbers = torch.arange(image_ID.shape[0], device=image_ID.device)
    for first in range(0, image_ID.shape[0], chunk):
        similarity = image_ID[first : first + chunk] @ text_TD.T
        own = numbers[first : first + chunk, None] == image_of_text_T[None, :]
        best_own = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
        before = (~(similarity < best_own) & ~own).sum(1)  # so that NaN counts as nearer too
        for k in AT:
            found[f"image_to_text_r{k}"] += int((before < k).sum())
    for first in range(0, text_TD.shape[0], chunk):
        similarity = text_TD[first : first + chunk] @ image_ID.T
        right = similarity.gather(1, image_of_text_T[first : first + chunk, None])
        before = (~(similarity < right)).sum(1) - 1
        for k in AT:
            found[f"text_to_image_r{k}"] += int((before < k).sum())
    of = {"image_to_text": image_ID.shape[0], "text_to_image": text_TD.shape[0]}
    return {name: count / of[name.rpartition("_")[0]] for name, count in found.items()}


@dataclass
class Retrieval:
    """Recall of images by text and of texts by image, over all images and all their captions, or the first of them."""

    task: str
    source: Source
    examples: int = 0
    max_captions: int | None = None
    """Captions of an image at most; None for all."""

    def check(self) -> None:
        """See `Evaluator.check`."""
        look_at(self.task, self.source)

    def run(self, encoder: Encoder) -> EvalResult:
        """Metrics: image_to_text_r1/5/10 and text_to_image_r1/5/10 in [0, 1]; images, texts, failed, broken_shards.

        Raises:
            EvalError: no image at all.
        """
        env = encoder.env
        with encoder.evaluating():
            images, texts, owner, faults = [], [], [], EvalFaults()
            keeper = ExampleKeeper(self.examples if env.is_main else 0, encoder.mean, encoder.std)
            count = 0
            for batch in encoder.batches(self.source, self.task):
                faults.add(batch["faults"])
                if not batch["target"]:
                    continue
                images.append(encoder.images(batch["image"]))
                start = count
                keeper.offer(batch["image"], lambda i, start=start: start + i)
                for captions in batch["target"]:
                    chosen = captions[: self.max_captions]
                    texts += chosen
                    owner += [count] * len(chosen)
                    count += 1
            encoder.stop.agree()
            counts = gather_objects((count, faults))
            if sum(c for c, _ in counts) == 0:
                raise EvalError(f"evaluation {self.task}: no image could be read (see the warnings before)")
            width = encoder.texts(["a"]).shape[1]  # for a rank that has no image of its own
            empty = torch.empty(0, width, device=env.device)
            mine = sum(c for c, _ in counts[: env.rank])
            all_images = gather_rows(torch.cat(images) if images else empty)
            my_texts = encoder.texts(texts) if texts else empty
            encoder.stop.agree()
            all_texts = gather_rows(my_texts)
            all_owners = gather_rows(torch.tensor(owner, device=env.device, dtype=torch.long) + mine)
            words = [t for part in gather_objects(texts) for t in part] if self.examples else []
            metrics: dict[str, float] = recalls(all_images, all_texts, all_owners)
            metrics |= {
                "images": len(all_images),
                "texts": len(all_texts),
                **EvalFaults.of_all([of_rank for _, of_rank in counts]).metrics(),
            }
            examples = self._examples(keeper, all_images, all_texts, all_owners, words)
        return EvalResult(self.task, "retrieval", metrics, examples)

    def _examples(
        self, keeper: ExampleKeeper, images: Tensor, texts: Tensor, owners: Tensor, words: list[str]
    ) -> list[dict]:
        examples = []
        for uri, number in keeper.kept():  # rank 0 keeps them, and its images come first
            scores, nearest = (texts @ images[number]).topk(min(5, len(texts)))
            truth = [words[t] for t in (owners == number).nonzero()[:, 0].tolist()]
            best = [[words[t], s] for t, s in zip(nearest.tolist(), scores.tolist(), strict=True)]
            examples.append({"image": uri, "truth": truth, "best": best})
        return examples
